"""The measured speed of decoding over that without speculation.

Each pod measures it by itself, by random slices of steps without drafts (ADR 0031), so no other pods are needed to compare
with. A swap of the draft begins a new measurement.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """A ratio of speeds, above 1 if speculation pays, with its 90 % interval."""

    ratio: float
    low: float
    high: float


def together(speedups: Sequence[Speedup]) -> Speedup | None:
    """The speedup that these pods report together, of which none decides alone: see `traffic`. None without any."""
    ordered = sorted(speedups, key=lambda one: one.ratio)
    if len(ordered) != 2:
        return mean(ordered[1:-1] if len(ordered) > 1 else ordered)
    low, high = ordered
    if low.ratio > 1.0:
        return low
    return high if high.ratio < 1.0 else Speedup(ratio=1.0, low=min(low.low, 1.0), high=max(high.high, 1.0))


def mean(speedups: Sequence[Speedup]) -> Speedup | None:
    """Mean over independent pods, with its interval; None without any."""
    if not speedups:
        return None
    ratio = sum(one.ratio for one in speedups) / len(speedups)
    width = math.hypot(*((one.high - one.low) / 2 for one in speedups)) / len(speedups)
    return Speedup(ratio=ratio, low=ratio - width, high=ratio + width)
