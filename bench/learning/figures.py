"""Acceptance lengths of runs, with intervals over the held-out requests."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from bench.learning.replay import Run

CONFIDENCE = 0.9
RESAMPLES = 2000
FIRST_GAIN = 0.05
"""Acceptance length above 1 from which on a draft is said to gain."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean (acceptance length in tokens per verify step, or a probability), with a bootstrap interval over requests."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


Steps = Sequence[Sequence[int]]
"""Verify steps of N held-out requests for each seed, [seeds, N]."""


def acceptance_length(tokens: Sequence[int], steps: Steps) -> Estimate:
    """Over `tokens` [N] of N requests and `steps`, which are averaged over seeds."""
    lengths, mean = np.asarray(tokens, float), np.asarray(steps, float).mean(0)
    chosen = _resamples(len(lengths))
    ratios = lengths[chosen].sum(1) / mean[chosen].sum(1)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(lengths.sum() / mean.sum()), float(low), float(high))


def mean(values: Sequence[Sequence[float]]) -> Estimate:
    """Over requests, after averaging over seeds; `values` [seeds, N]."""
    averaged = np.asarray(values, float).mean(0)
    low, high = np.quantile(averaged[_resamples(len(averaged))].mean(1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(averaged.mean()), float(low), float(high))


def relative(steps: Steps, baseline: Steps) -> Estimate:
    """Acceptance length over that of a baseline, paired by request."""
    mine, other = np.asarray(steps, float).mean(0), np.asarray(baseline, float).mean(0)
    chosen = _resamples(len(mine))
    ratios = other[chosen].sum(1) / mine[chosen].sum(1)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(other.sum() / mine.sum()), float(low), float(high))


def surplus(tokens: Sequence[int], steps: Steps, converged: Steps) -> Estimate:
    """Acceptance length above 1, over that of a converged draft, paired by request."""
    lengths, mine, other = (
        np.asarray(tokens, float),
        np.asarray(steps, float).mean(0),
        np.asarray(converged, float).mean(0),
    )

    def ratio(chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        tokens, mine_of, other_of = lengths[chosen].sum(-1), mine[chosen].sum(-1), other[chosen].sum(-1)
        found: npt.NDArray[np.float64] = (tokens / mine_of - 1) / (tokens / other_of - 1)
        return found

    low, high = np.quantile(ratio(_resamples(len(mine))), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(ratio(np.arange(len(mine)))), float(low), float(high))


def lowest_of_first(checkpoints: Sequence[Steps]) -> Estimate:
    """The lowest acceptance length at any checkpoint over that at the first one: below 1 it fell under where it began."""
    return min((relative(steps, checkpoints[0]) for steps in checkpoints), key=lambda one: one.mean)


def least_kept(checkpoints: Sequence[Steps]) -> Estimate:
    """The lowest acceptance length at any checkpoint over the best until then: below 1 something was forgotten."""
    best, kept = checkpoints[0], []
    for steps in checkpoints:
        best = min(best, steps, key=_total)
        kept.append(relative(steps, best))
    return min(kept, key=lambda one: one.mean)


def first_gain(run: Run, kind: str, tokens: Sequence[int]) -> tuple[int, float] | None:
    """Requests and processor seconds until the served draft gains on a kind; None if it never does."""
    for checkpoint in run.checkpoints:
        if sum(tokens) / sum(checkpoint.steps[kind]) >= 1.0 + FIRST_GAIN:
            return checkpoint.requests, checkpoint.seconds
    return None


def _total(steps: Steps) -> int:
    return sum(map(sum, steps))


def _resamples(number: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, number, (RESAMPLES, number))
