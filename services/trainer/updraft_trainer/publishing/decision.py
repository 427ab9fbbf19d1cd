"""Is a candidate worth publishing? A pure function of the estimate: a verdict, and the sentence that a person reads.

The registry's gate asks the same question of the same evidence (`updraft_rollouts.evidence`); asking it here first keeps
drafts that would be rejected off the wire.
"""

from dataclasses import dataclass

from updraft_trainer.publishing.estimate import GainEstimate

NO_DRAFT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishThresholds:
    """What a candidate has to reach; see the settings of the same names."""

    min_samples: int
    min_gain_percent: float
    min_first_gain_percent: float
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishDecision:
    """Whether to publish, and why."""

    is_better: bool
    reason: str


def decide(estimate: GainEstimate, *, baseline_version: int, bar: PublishThresholds) -> PublishDecision:
    """Publish what surely gains over what serves; against no draft, the gain must also pay for drafting."""
    num_samples = len(estimate.pairs)
    gain = estimate.gain(bar.confidence)
    if gain is None or num_samples < bar.min_samples:
        return PublishDecision(is_better=False, reason=f"{num_samples} held-out requests of {bar.min_samples} needed")
    told = (
        f"acceptance length {gain.candidate:.2f} against {gain.baseline:.2f}, "
        f"gain {gain.percent:+.1f} % ({gain.low_percent:+.1f} to {gain.high_percent:+.1f} %)"
    )
    if gain.low_percent < bar.min_gain_percent:
        return PublishDecision(is_better=False, reason=f"{told}: not surely {bar.min_gain_percent:g} %")
    if baseline_version == NO_DRAFT and gain.percent < bar.min_first_gain_percent:
        return PublishDecision(is_better=False, reason=f"{told}: a first draft needs {bar.min_first_gain_percent:g} %")
    return PublishDecision(is_better=True, reason=told)
