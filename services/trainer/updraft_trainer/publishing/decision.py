"""Decides whether a candidate is worth publishing: a pure function of its estimate, with the sentence that a person reads.

The registry's gate decides by the same evidence (`updraft_rollouts.evidence`). Deciding here first avoids uploading drafts
that the gate would reject.
"""

from dataclasses import dataclass
from typing import NamedTuple

from updraft_rollouts.evidence import Gain, effective_size, weighted
from updraft_trainer.publishing.estimate import GainEstimate

NO_DRAFT = 0

MIN_COVERED = 0.5
"""Share of today's traffic whose kinds have held-out requests. With less, the gain says little about today's traffic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishThresholds:
    """See the settings of the same names."""

    min_samples: int
    min_gain_percent: float
    min_first_gain_percent: float
    confidence: float


class PublishDecision(NamedTuple):
    """`sentence` says why, also if it is published."""

    should_publish: bool
    sentence: str


def decide(
    estimate: GainEstimate, *, subject: str, baseline_version: int, thresholds: PublishThresholds
) -> PublishDecision:
    """Publish if the gain over the serving draft is certain for today's traffic, and no kind of traffic is surely worse.

    A first draft must also gain enough to pay for drafting. `subject` names the candidate in the sentence.
    """
    gain = estimate.gain(thresholds.confidence)
    missing = _missing(estimate, thresholds)
    if gain is None or missing:
        return PublishDecision(should_publish=False, sentence=f"{subject} waits for {missing}")
    comparison = f"{subject} is {_comparison(gain, estimate, baseline_version)}"
    if gain.high_percent < 0.0:
        return PublishDecision(should_publish=False, sentence=f"{comparison}: surely worse")
    if gain.low_percent < thresholds.min_gain_percent:
        required = f" of a gain of {thresholds.min_gain_percent:g} %" if gain.low_percent > 0.0 else ""
        return PublishDecision(should_publish=False, sentence=f"{comparison}: not sure yet{required}")
    if losses := estimate.losses():
        return PublishDecision(should_publish=False, sentence=f"{comparison}, but {losses[0]}")
    if baseline_version == NO_DRAFT and gain.percent < thresholds.min_first_gain_percent:
        return PublishDecision(
            should_publish=False,
            sentence=f"{comparison}: a first version must gain {thresholds.min_first_gain_percent:g} %",
        )
    return PublishDecision(should_publish=True, sentence=comparison)


def _missing(estimate: GainEstimate, thresholds: PublishThresholds) -> str:
    """The evidence that is missing; empty if there is enough."""
    num_samples, size = len(weighted(estimate.pairs)), effective_size(estimate.pairs)
    needed = f"{thresholds.min_samples} held-out requests of today's traffic"
    if num_samples < thresholds.min_samples:
        return f"{needed}, has {num_samples}"
    if size < thresholds.min_samples / 2:
        return f"{needed}, has {num_samples} that count as {size:.1f}"
    if estimate.covered < MIN_COVERED:
        return f"{needed}, has them for {100 * estimate.covered:.0f} % of it"
    return ""


def _comparison(gain: Gain, estimate: GainEstimate, baseline_version: int) -> str:
    than = f"version {baseline_version}" if baseline_version else "no draft"
    change = f"{abs(gain.percent):.1f} % {'better' if gain.percent >= 0 else 'worse'} than {than} for today's traffic"
    interval = f"{gain.low_percent:+.1f} % to {gain.high_percent:+.1f} %"
    return f"{change} ({interval}, {len(weighted(estimate.pairs))} held-out requests)"
