"""What replay keeps within its bytes: a window of the newest, a sample of everything older, and what is held out.

A sample that leaves the window joins the reservoir of its cluster, which is a uniform sample of all that ever left:
each trace has a rank, the hash of its id, and the lowest ranks stay. That is reservoir sampling by random keys
(Efraimidis and Spirakis 2006, with equal weights), the form of Vitter's algorithm R (1985) whose capacity may shrink:
bytes are shared among clusters, and a new cluster takes from the largest. It needs no counter, nor luck after a restart.
Pure: it says what to move and drop, and knows neither files nor tensors.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum


class Pool(StrEnum):
    """Where a sample is kept."""

    WINDOW = "window"
    RESERVOIR = "reservoir"
    EVALUATION = "evaluation"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class SampleEntry:
    """A sample as far as keeping and choosing need it. `order` counts admissions."""

    trace_id: str
    order: int
    cluster: str
    place: Pool
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayLimits:
    """Bytes of serialized traces, by place."""

    window_bytes: int
    reservoir_bytes: int
    evaluation_bytes: int

    @classmethod
    def of(cls, max_bytes: int) -> "ReplayLimits":
        """Half for what is new, a tenth held out, the rest for what is old."""
        window_bytes, evaluation_bytes = max_bytes // 2, max_bytes // 10
        return cls(
            window_bytes=window_bytes,
            reservoir_bytes=max_bytes - window_bytes - evaluation_bytes,
            evaluation_bytes=evaluation_bytes,
        )


@dataclass(slots=True)
class RetentionChanges:
    """Trace ids of the samples that moved to their reservoir, and of those that are gone."""

    moved: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def rank(trace_id: str) -> int:
    """A number that is uniform over trace ids whatever rule made them; lower ones stay in a reservoir."""
    return int.from_bytes(hashlib.blake2b(trace_id.encode(), digest_size=8).digest())


class _Heap:
    """The samples of one group in one place; the one that has to go first is in front."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._heap: list[tuple[int, SampleEntry]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, one: SampleEntry) -> None:
        self.num_bytes += one.num_bytes
        heapq.heappush(self._heap, (_turn_to_go(one), one))

    def pop(self) -> SampleEntry:
        _, one = heapq.heappop(self._heap)
        self.num_bytes -= one.num_bytes
        return one

    def discard(self, one: SampleEntry) -> None:
        self._heap.remove((_turn_to_go(one), one))
        heapq.heapify(self._heap)
        self.num_bytes -= one.num_bytes


class Retention:
    """The index of what is kept. `add` and `enforce` bring it within `limits`."""

    def __init__(self, limits: ReplayLimits, kept: Iterable[SampleEntry] = ()) -> None:
        self._limits = {
            Pool.WINDOW: limits.window_bytes,
            Pool.RESERVOIR: limits.reservoir_bytes,
            Pool.EVALUATION: limits.evaluation_bytes,
        }
        self._kept: dict[str, SampleEntry] = {}
        # One shelf for the whole window; elsewhere one a cluster, for clusters share the bytes.
        self._shelves: dict[Pool, dict[str, _Heap]] = {place: {} for place in Pool}
        for one in kept:
            self._put(one)

    def __iter__(self) -> Iterator[SampleEntry]:
        return iter(self._kept.values())

    def __contains__(self, trace_id: object) -> bool:
        return trace_id in self._kept

    def num_samples(self, place: Pool) -> int:
        """Samples in a place."""
        return sum(map(len, self._shelves[place].values()))

    def num_bytes(self, place: Pool) -> int:
        """Bytes of the samples in a place."""
        return sum(shelf.num_bytes for shelf in self._shelves[place].values())

    def add(self, one: SampleEntry) -> RetentionChanges:
        """Keep one more sample and make room for it; it may itself be among the dropped."""
        self._put(one)
        return self.enforce()

    def discard(self, trace_id: str) -> None:
        """Forget a sample, if it is there."""
        if one := self._kept.pop(trace_id, None):
            self._shelves[one.place][_group(one)].discard(one)

    def enforce(self) -> RetentionChanges:
        """Bring every place within its limit; the group with the most bytes gives first."""
        changes = RetentionChanges()
        for place, limit in self._limits.items():  # the window first: what leaves it joins a reservoir
            while self.num_bytes(place) > limit:
                one = self._take_first(place)
                if place is Pool.WINDOW:
                    self._put(replace(one, place=Pool.RESERVOIR))
                    changes.moved.append(one.trace_id)
                else:
                    changes.dropped.append(one.trace_id)
        return changes

    def _take_first(self, place: Pool) -> SampleEntry:
        shelves = self._shelves[place]
        group = max(shelves, key=lambda group: shelves[group].num_bytes)
        one = shelves[group].pop()
        if not shelves[group]:
            del shelves[group]
        del self._kept[one.trace_id]
        return one

    def _put(self, one: SampleEntry) -> None:
        self._kept[one.trace_id] = one
        self._shelves[one.place].setdefault(_group(one), _Heap()).put(one)


def _group(one: SampleEntry) -> str:
    return "" if one.place is Pool.WINDOW else one.cluster


def _turn_to_go(one: SampleEntry) -> int:
    """Lower goes first: the oldest, or in a reservoir the highest rank."""
    return -rank(one.trace_id) if one.place is Pool.RESERVOIR else one.order
