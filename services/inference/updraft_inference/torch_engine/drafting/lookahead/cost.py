"""The cost of a step on this machine, in seconds by the number of rows of its forward pass.

A step of B sequences that verifies k_i drafts each is one forward over the sum of k_i + 1 rows, so one curve describes every
B and k. The curve is measured when the engine starts, and every step corrects it. A measurement next to a busy neighbour is
therefore replaced within seconds of serving, also for numbers of rows that were never run: they follow their neighbours.
A factor per number of sequences covers what rows alone do not explain (long contexts, sampling).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows that are measured. Costs between them are interpolated linearly."""

MEMORY = 20.0
"""A mean remembers about so many steps."""
OUTLIER = 2.0
"""A step counts at most this many times its expected duration, because a busy neighbour is not a property of the step."""
_FADE = 0.995
"""How much of a point's weight each step leaves."""
_DOUBT = 0.01
"""How fast a point that does not run returns to the shape of the start-up, if it costs more than that."""
_FACTOR_PRIOR = 4.0
"""Steps that a factor of 1 is worth."""
_MIXED_RATE = 0.5
"""Weight of the newest step that also reads a prompt. It is high because costs rise along a prompt."""
_CHAIN_SHARE = 0.1
"""Cost of one token of every chain as a share of the target's forward, until it is measured."""


@dataclass(slots=True)
class _Mean:
    """A decayed mean; its first observation replaces the initial value."""

    value: float = 1.0
    weight: float = 0.0

    def add(self, value: float, share: float = 1.0) -> None:
        self.weight = min(self.weight + share, MEMORY)
        self.value += (value - self.value) * share / self.weight


class CostCurve:
    """Seconds of a forward by number of rows. More rows never cost less."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        self._rows = sorted(measured)
        # Neighbours only ever slow a measurement down, so a larger forward bounds a smaller one.
        self._start: list[float] = np.minimum.accumulate([measured[rows] for rows in self._rows[::-1]])[::-1].tolist()
        self._seconds = self._start
        self._weights = [0.0] * len(self._rows)
        """Steps at each point that still count. The measurement at start-up counts as none."""

    def at(self, rows: int) -> float:
        """Seconds of a forward over `rows` rows; proportional beyond the last point. Any thread may call it."""
        return self._between([rows])[0]

    def up_to(self, most: int) -> list[float]:
        """The same for 0, 1, ... `most` rows."""
        return self._between(range(most + 1))

    def observe(self, rows: int, seconds: float) -> None:
        """Correct the points next to `rows`. Points that did not run lately change in proportion to the nearest of them."""
        ratio = min(seconds / self.at(rows), OUTLIER)
        self._weights = [weight * _FADE for weight in self._weights]
        nearest = self._points(rows)
        changes: dict[int, float] = {}
        for point, share in nearest:
            self._weights[point] = min(self._weights[point] + share, MEMORY)
            changes[point] = 1 + (ratio - 1) * share / self._weights[point]
        low, high = nearest[0][0], nearest[-1][0]
        corrected = []
        for point, (old, weight) in enumerate(zip(self._seconds, self._weights, strict=True)):
            source = min(max(point, low), high)
            new, staleness = old * changes[source], max(0.0, 1 - weight)
            if point not in changes:
                new = old + (new - old) * staleness
            if point > high:
                shape = self._seconds[high] * self._start[point] / self._start[high]
                new -= max(0.0, new - shape) * _DOUBT * staleness
            corrected.append(new)
        self._seconds = _monotone(corrected, self._weights)

    def _between(self, rows: Sequence[int]) -> list[float]:
        seconds, far = self._seconds, 1_000_000
        values: list[float] = np.interp(
            rows, [*self._rows, far * self._rows[-1]], [*seconds, far * seconds[-1]]
        ).tolist()
        return values

    def _points(self, rows: int) -> list[tuple[int, float]]:
        """The points next to `rows`, with their shares of an observation there."""
        high = int(np.searchsorted(self._rows, rows))
        if high == len(self._rows) or self._rows[high] == rows or high == 0:
            return [(min(high, len(self._rows) - 1), 1.0)]
        share = (rows - self._rows[high - 1]) / (self._rows[high] - self._rows[high - 1])
        return [(high - 1, 1.0 - share), (high, share)]


def _monotone(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest values that never fall (isotonic regression by pooling adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for first, own in zip(values, weights, strict=True):
        value, weight, num = first, own + 0.05, 1
        while pools and pools[-1][0] > value:
            earlier, earlier_weight, earlier_num = pools.pop()
            value = (earlier * earlier_weight + value * weight) / (earlier_weight + weight)
            weight, num = earlier_weight + weight, earlier_num + num
        pools.append((value, weight, num))
    return [value for value, _, num in pools for _ in range(num)]


class CostTable:
    """Seconds of a verify step: the curve, times a factor per number of sequences."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        self.curve = CostCurve(measured)
        self._factors: dict[int, _Mean] = {}
        self._mixed = 1.0

    def seconds(self, batch: int, rows: int) -> float:
        """A step of `batch` sequences that verifies `rows` rows."""
        return self.curve.at(rows) * self._factor(batch)

    def up_to(self, batch: int, most: int) -> list[float]:
        """The same for 0, 1, ... `most` rows."""
        factor = self._factor(batch)
        return [factor * seconds for seconds in self.curve.up_to(most)]

    def observe(self, batch: int, rows: int, seconds: float) -> None:
        seconds = min(seconds, OUTLIER * self.seconds(batch, rows))
        self.curve.observe(rows, seconds)
        self._factors.setdefault(batch, _Mean()).add(seconds / self.curve.at(rows))

    def mixed(self, rows: int) -> float:
        """A step that also reads prompts, by all its rows."""
        return self.curve.at(rows) * self._mixed

    def observe_mixed(self, rows: int, seconds: float) -> None:
        ratio = min(seconds / self.curve.at(rows), OUTLIER * self._mixed)
        self._mixed += (ratio - self._mixed) * _MIXED_RATE

    def _factor(self, batch: int) -> float:
        factor = self._factors.get(batch, _Mean())
        return (factor.value * factor.weight + _FACTOR_PRIOR) / (factor.weight + _FACTOR_PRIOR)


@dataclass(slots=True)
class ChainCost:
    """Seconds per token of the draft model's chains, all chains of a step together.

    Chains do not count if the model first had to read rows that it left out while n-gram lookup served a sequence. That reading
    is no cost of drafting, because those rows are read sooner or later anyway.
    """

    table: CostTable
    _per_token: dict[int, _Mean] = field(default_factory=dict)
    """Seconds per token, by number of sequences."""

    def token(self, sequences: int) -> float:
        """Seconds for one more token of every chain."""
        curve = self.table.curve
        nearest = min(self._per_token, key=lambda known: (abs(known - sequences), known), default=None)
        if nearest is None:
            return _CHAIN_SHARE * curve.at(sequences)
        return self._per_token[nearest].value * curve.at(sequences) / curve.at(nearest)

    def observe(self, *, sequences: int, length: int, behind: int, seconds: float) -> None:
        """Chains of `length` tokens took `seconds`, after the model had read `behind` rows of all sequences together."""
        if behind <= sequences * (length + 1):
            expected = self.token(sequences)
            self._per_token.setdefault(sequences, _Mean()).add(min(seconds / length, OUTLIER * expected))
