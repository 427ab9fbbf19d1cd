"""What a forward costs on this machine: seconds by the number of rows that it reads.

Measured once when the engine starts and refined while it serves. A step of B sequences that verifies k_i drafts of each
is one forward over the sum of k_i + 1 rows, so one curve tells of every B and k, and of unequal k. What the curve does
not know (long contexts, attention padded to the longest drafts, sampling, a busy neighbour) is a factor on it, for each number
of sequences and band of drafts a sequence: where few drafts cost more than the curve says, so will more, until they are tried.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows that are measured; costs between them lie on straight lines."""

DECAY = 0.05
"""Weight of the newest step of a kind: about 20 are remembered."""
OUTLIER = 2.0
"""A step may count at most this many times what was expected: a neighbour on the machine is not a dear draft."""
_PRIOR_STEPS = 4.0
_FADES = 0.995
"""Of what a band weighs, with each step in another band of as many sequences: what was dear once is tried again some time."""
_MIXED_DECAY = 0.5
"""Of what steps with prompts take: it rises along a prompt, whose pieces see ever more."""
_BANDS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Drafts a sequence, at most; the first is plain decoding."""


@dataclass(slots=True)
class Factor:
    """A decayed mean of measured over expected, which starts at what is known of others."""

    value: float = 1.0
    weight: float = 0.0

    def add(self, ratio: float) -> None:
        """Count one step."""
        self.weight = min(self.weight + 1.0, 1.0 / DECAY)
        self.value += (ratio - self.value) / self.weight

    def shrunk(self, to: float) -> float:
        """The mean, with `to` for what few steps do not tell."""
        return (self.value * self.weight + to * _PRIOR_STEPS) / (self.weight + _PRIOR_STEPS)


@dataclass(slots=True)
class CostTable:
    """Seconds of a verify forward. `curve` is what was measured alone, by rows (of `GRID`)."""

    curve: Mapping[int, float]
    _rows: list[int] = field(init=False)
    _seconds: list[float] = field(init=False)
    _known: list[float] = field(default_factory=list)
    """By the curve, by number of rows."""
    _factors: dict[int, list[Factor]] = field(default_factory=dict)
    """By number of sequences, one a band."""
    _mixed: float = 1.0
    """Of steps with prompts."""

    def __post_init__(self) -> None:
        self._rows = sorted(self.curve)
        # More rows never cost less: what says so is noise, and would make drafts that nobody wants look free.
        seconds, most = [], 0.0
        for rows in self._rows:
            most = max(most, self.curve[rows])
            seconds.append(most)
        self._seconds = seconds

    def alone(self, rows: int) -> float:
        """Seconds by the curve; beyond its end in proportion."""
        last = self._rows[-1]
        if rows >= last:
            return self._seconds[-1] * rows / last
        i = bisect_left(self._rows, rows)
        if self._rows[i] == rows or i == 0:
            return self._seconds[i]
        low, high = self._rows[i - 1], self._rows[i]
        share = (rows - low) / (high - low)
        return self._seconds[i - 1] + share * (self._seconds[i] - self._seconds[i - 1])

    def seconds(self, batch: int, rows: int) -> float:
        """Of a step of `batch` sequences that verifies `rows` rows, by the curve and by what such steps took."""
        return self.alone(rows) * self._by_band(batch)[_band(batch, rows)]

    def up_to(self, batch: int, most: int) -> list[float]:
        """The same for any number of rows, from 0 up to `most`."""
        self._known += [self.alone(rows) for rows in range(len(self._known), most + 1)]
        ends = [*(batch + int(bound * max(1, batch)) for bound in _BANDS), most]
        result: list[float] = []
        for factor, end in zip(self._by_band(batch), ends, strict=True):
            result += [alone * factor for alone in self._known[len(result) : min(end, most) + 1]]
        return result

    def observe(self, batch: int, rows: int, seconds: float) -> None:
        """Count a step."""
        ratio = min(seconds / self.alone(rows), OUTLIER * self.seconds(batch, rows) / self.alone(rows))
        bands = self._bands(batch)
        for band in bands:
            band.weight *= _FADES
        bands[_band(batch, rows)].add(ratio)

    def mixed(self, rows: int) -> float:
        """Of a step that also reads prompts, by all its rows."""
        return self.alone(rows) * self._mixed

    def observe_mixed(self, rows: int, seconds: float) -> None:
        """Count such a step."""
        ratio = min(seconds / self.alone(rows), OUTLIER * self._mixed)
        self._mixed += (ratio - self._mixed) * _MIXED_DECAY

    def _by_band(self, batch: int) -> list[float]:
        """The factor of each band, with those of fewer drafts for what few steps do not tell."""
        return list(accumulate(self._bands(batch), lambda lower, band: band.shrunk(lower), initial=1.0))[1:]

    def _bands(self, batch: int) -> list[Factor]:
        return self._factors.setdefault(batch, [Factor() for _ in range(len(_BANDS) + 1)])


def _band(batch: int, rows: int) -> int:
    return bisect_left(_BANDS, (rows - batch) / max(1, batch))
