"""Measures the speedup by speculation: the speed of steps that may speculate over the speed of steps that may not. Pure.

Steps come in blocks of a few seconds. One slice of each block, at a random place, runs the other way: without drafts while
speculation is in use, with drafts while it is off. So both kinds of steps meet the same requests and the same neighbours on
the machine, and only steps of one block are compared. Under a load where speculation is surely slower it is turned off. No
model of costs decides this: what is compared is time on the wall.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

LOADS = (1, 2, 4, 8, 16, 32)
"""Smallest batch size of each load whose speedup is measured by itself."""

SLICE = 8
"""Steps. That is long enough to contain what a slice leaves to later steps, such as states that the draft has not read yet."""
BLOCK, OFF_BLOCK = 256, 128
"""Steps of a block while speculation is in use, and while it is off."""
FIRST_BLOCK, FIRST_SLICE = 32, 4
"""The same before anything is known; a slice with drafts has the usual length. Steps without drafts yield one token each and
take nearly the same time, so a few of them say as much as many with drafts."""
MIN_BLOCKS = 6
"""Blocks before anything is concluded."""
MEMORY = 24
"""Blocks that are remembered: two to three minutes at 30 steps a second."""
DEVIATIONS = 1.645
"""Half of a 90 % interval, in standard deviations."""
NUM_VERSIONS = 3
"""Drafts whose worth is remembered."""


@dataclass(frozen=True, slots=True)
class Speedup:
    """Speed of decoding over that without speculation, measured on live traffic, with its 90 % interval."""

    ratio: float
    low: float
    high: float


Pair = tuple[float, float]
"""For a block: seconds that its speculating steps would have taken without drafts, and seconds that they took."""


@dataclass(slots=True)
class _Sum:
    """Tokens and seconds of the steps of one kind in a block."""

    tokens: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Load:
    """One load: its running block, and the pairs of the newest finished ones."""

    rng: random.Random
    is_on: bool = True
    pairs: list[Pair] = field(default_factory=list)
    _before: list[Pair] = field(default_factory=list)
    """Pairs before the last turn."""
    _sums: dict[bool, _Sum] = field(default_factory=dict)
    _num_blocks: int = 0
    _length: int = 0
    _slice: int = 0
    _start: int = 0
    _num_steps: int = 0

    def __post_init__(self) -> None:
        self._begin()

    @property
    def known(self) -> list[Pair]:
        """The newest pairs, but those before the last turn while the new ones are too few."""
        return self.pairs if len(self.pairs) >= MIN_BLOCKS else self._before or self.pairs

    def allows_drafts(self) -> bool:
        is_other = self._start <= self._num_steps < self._start + self._slice
        return self.is_on is not is_other

    def observe(self, tokens: int, seconds: float, *, is_drafted: bool) -> bool:
        """Returns whether this was the last step of a block."""
        of_kind = self._sums[is_drafted]
        of_kind.tokens += tokens
        of_kind.seconds += seconds
        return self.skip()

    def skip(self) -> bool:
        """A step that says nothing of the speed of its kind. Returns whether it was the last one of a block."""
        self._num_steps += 1
        is_last = self._num_steps == self._length
        if is_last:
            self._end()
        return is_last

    def _end(self) -> None:
        with_drafts, without = self._sums[True], self._sums[False]
        self._num_blocks += 1
        if with_drafts.tokens and without.tokens:
            pair = (with_drafts.tokens * without.seconds / without.tokens, with_drafts.seconds)
            self.pairs = [*self.pairs[1 - MEMORY :], pair]
            self._turn()
        elif self._num_blocks >= MIN_BLOCKS and not self.known:
            self.is_on = True  # it cannot be measured, so it is used
        self._begin()

    def _turn(self) -> None:
        """Off where speculation is surely slower, and on again where it is faster.

        A turn begins a new measurement: blocks of the other state have other numbers of speculating steps.
        """
        speedup, was_on = _speedup(self.pairs), self.is_on
        if speedup is not None:
            self.is_on = speedup.high >= 1.0 if was_on else speedup.ratio > 1.0
        if self.is_on is not was_on:
            self._before, self.pairs = self.pairs, []

    def _begin(self) -> None:
        is_first = len(self.pairs) < MIN_BLOCKS
        self._length = FIRST_BLOCK if is_first else BLOCK if self.is_on else OFF_BLOCK
        self._slice = FIRST_SLICE if is_first and self.is_on else SLICE
        self._start = self.rng.randrange(self._length - self._slice + 1)
        self._num_steps = 0
        self._sums = {True: _Sum(), False: _Sum()}


class SpeedupMeter:
    """Says before each step whether it may speculate, and learns from its speed. Not thread-safe, except `speedups`."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._versions: dict[int, dict[int, _Load]] = {}
        self._loads: dict[int, _Load] = {}
        self.serve(0)

    @property
    def speedups(self) -> Mapping[int, Speedup]:
        """Known speedups by the smallest batch size of the load; 0: of all loads. Any thread may call it."""
        pairs = {size: load.known for size, load in self._loads.items()}
        known = {size: _speedup(of_load) for size, of_load in ({0: list(chain(*pairs.values()))} | pairs).items()}
        return {size: speedup for size, speedup in known.items() if speedup is not None}

    def allows_drafts(self, batch: int) -> bool:
        """Whether the next step, of so many sequences, may speculate."""
        return self._at(batch).allows_drafts()

    def observe(self, batch: int, tokens: int, seconds: float, *, is_drafted: bool) -> bool:
        """A step of so many sequences, in which no prompt was read, yielded these tokens, all sequences together.

        A step without tokens, because all its requests failed, says nothing about speed. Returns whether the speedups may have
        changed.
        """
        return bool(tokens) and self._at(batch).observe(tokens, seconds, is_drafted=is_drafted)

    def skip(self, batch: int) -> bool:
        """A step of which no more is known than that it was one, so that a slice ends even if nothing can be measured."""
        return self._at(batch).skip()

    def serve(self, version: int, *, is_on: bool | None = True) -> None:
        """Another draft is served. Measurements of the last drafts are kept, because a switchback alternates two.

        Speculation with a new draft `is_on` from the beginning, or only in slices; None: at each load as with the draft before.
        """
        before = self._loads
        loads = self._versions.pop(version, None) or {
            size: _Load(self._rng, is_on=before[size].is_on if is_on is None else is_on) for size in LOADS
        }
        self._versions[version] = self._loads = loads
        self._versions = dict(list(self._versions.items())[-NUM_VERSIONS:])

    def _at(self, batch: int) -> _Load:
        return self._loads[load_of(batch)]


def load_of(batch: int) -> int:
    """The load of a step of so many sequences, by its smallest batch size."""
    return max(size for size in LOADS if size <= max(1, batch))


def _speedup(pairs: Sequence[Pair]) -> Speedup | None:
    """None while too little is known."""
    taken = sum(seconds for _, seconds in pairs)
    if len(pairs) < MIN_BLOCKS or not taken:
        return None
    ratio = sum(without for without, _ in pairs) / taken
    variance = sum((without - ratio * seconds) ** 2 for without, seconds in pairs) * len(pairs) / (len(pairs) - 1)
    width = DEVIATIONS * math.sqrt(variance) / taken
    return Speedup(ratio, ratio - width, ratio + width)
