"""How often drafts are kept, by their position in the chain: decayed, of one sequence with a prior that all share.

The rate of position i is conditional: given that the drafts before it were kept. Its estimate is the mean of a Beta
posterior whose counts fade, so that a drafter that became better, or traffic that became harder, shows soon.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

POSITIONS = 5
"""Positions with a rate of their own; later ones share the last one's: chains that got so far go on much alike."""


@dataclass(slots=True)
class AcceptanceEstimator:
    """Of one kind of drafts. `memory` is how many observations of a position count, about."""

    memory: float
    _kept: list[float] = field(default_factory=lambda: [0.0] * POSITIONS)
    _seen: list[float] = field(default_factory=lambda: [0.0] * POSITIONS)

    def observe(self, kept: int, *, is_refused: bool) -> None:
        """A chain of which the first `kept` drafts were kept, and then one refused or none was left."""
        for position in range(kept):
            self._add(position, 1.0)
        if is_refused:
            self._add(kept, 0.0)

    def num_seen(self, position: int) -> float:
        """Observations that still count, in the end `memory`."""
        return self._seen[_place(position)]

    def rates(self, priors: Sequence[float], weight: float) -> list[float]:
        """Of each of `POSITIONS`, the probability that the draft there is kept given those before it; a prior counts like
        `weight` observations."""
        return [
            (kept + prior * weight) / (seen + weight)
            for kept, seen, prior in zip(self._kept, self._seen, priors, strict=True)
        ]

    def _add(self, position: int, value: float) -> None:
        place, fading = _place(position), 1.0 - 1.0 / self.memory
        self._kept[place] = self._kept[place] * fading + value
        self._seen[place] = self._seen[place] * fading + 1.0


def _place(position: int) -> int:
    return min(position, POSITIONS - 1)


@dataclass(frozen=True, slots=True)
class Prior:
    """What is assumed of a drafter before anything was seen: a rate, and how many observations it is worth."""

    rate: float
    weight: float


def survival(
    own: AcceptanceEstimator, shared: AcceptanceEstimator, assumed: Prior, length: int, own_weight: float
) -> list[float]:
    """Probability that all of the first i + 1 drafts are kept, i below `length`; it never rises."""
    rates = own.rates(shared.rates([assumed.rate] * POSITIONS, assumed.weight), own_weight)
    rates += rates[-1:] * (length - POSITIONS)
    return list(accumulate(rates[:length], mul))
