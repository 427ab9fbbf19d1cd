"""Decides whether a candidate is worth publishing: a pure function of its estimate, with a reason for the log.

The registry's gate decides by the same evidence (`updraft_rollouts.evidence`). Deciding here first avoids uploading drafts
that the gate would reject.
"""

from dataclasses import dataclass

from updraft_trainer.publishing.estimate import GainEstimate

NO_DRAFT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishThresholds:
    """See the settings of the same names."""

    min_samples: int
    min_gain_percent: float
    min_first_gain_percent: float
    confidence: float


def decide(estimate: GainEstimate, *, baseline_version: int, thresholds: PublishThresholds) -> tuple[bool, str]:
    """Whether to publish, and why: the gain over the serving draft must be certain. A first draft must also gain enough to
    pay for drafting."""
    num_samples = len(estimate.pairs)
    gain = estimate.gain(thresholds.confidence)
    if gain is None or num_samples < thresholds.min_samples:
        return False, f"{num_samples} held-out requests of {thresholds.min_samples} needed"
    evidence = (
        f"acceptance length {gain.candidate:.2f} against {gain.baseline:.2f}, "
        f"gain {gain.percent:+.1f} % ({gain.low_percent:+.1f} to {gain.high_percent:+.1f} %)"
    )
    if gain.low_percent < thresholds.min_gain_percent:
        return False, f"{evidence}: the lower bound is below {thresholds.min_gain_percent:g} %"
    if baseline_version == NO_DRAFT and gain.percent < thresholds.min_first_gain_percent:
        return False, f"{evidence}: a first draft needs {thresholds.min_first_gain_percent:g} %"
    return True, evidence
