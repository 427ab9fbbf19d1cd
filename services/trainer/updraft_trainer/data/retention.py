"""Keeps replay within its size: a window of the newest samples, a sample of everything older, and held-out samples.

A sample that leaves the window joins its cluster's reservoir, which is a uniform sample of everything that ever left. Each
trace has a rank, the hash of its id, and the lowest ranks are kept. This is reservoir sampling by random keys (Efraimidis and
Spirakis 2006, with equal weights), the variant of Vitter's algorithm R (1985) whose capacity may shrink: clusters share the
bytes, and a new cluster takes from the largest one. The smallest clusters share as one, because over time any number of
outliers come, and would otherwise leave kinds no more than an outlier has. It needs no counter and survives restarts.
Pure: it returns what to move and drop, and uses neither files nor tensors.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum

MAX_KINDS = 32
"""So many clusters, the largest, count as kinds of traffic: as many as can take new samples at one time."""


CHUNK_MARK = "#"
"""In the id of a sample that is a later chunk of a request: between the trace id and the name of the chunk."""


class Pool(StrEnum):
    WINDOW = "window"
    RESERVOIR = "reservoir"
    EVALUATION = "evaluation"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class SampleEntry:
    """Metadata of a stored sample. `order` counts admissions."""

    trace_id: str
    order: int
    cluster: str
    pool: Pool
    num_bytes: int
    num_tokens: int
    """Captured tokens, with those of the prompt."""
    probability: float = 1.0
    """With which the request was captured."""
    tenant: str = ""
    """The hash of its tenant, in hexadecimal; empty: none."""
    finished_ms: int = 0
    """When the request ended, in Unix milliseconds."""

    @property
    def request(self) -> str:
        """The trace id of the request that the sample is, or is a chunk of."""
        return request_of(self.trace_id)

    @property
    def group(self) -> str:
        """Samples of one group compete for space: the whole window, or else a cluster."""
        return "" if self.pool is Pool.WINDOW else self.cluster

    @property
    def priority(self) -> int:
        """The lowest leaves first: the oldest, or in a reservoir the highest rank."""
        return -rank(self.trace_id) if self.pool is Pool.RESERVOIR else self.order


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayLimits:
    """Bytes of serialized traces per pool. A tenant with more than `max_tenant_share` of a full pool makes room first."""

    window_bytes: int
    reservoir_bytes: int
    evaluation_bytes: int
    max_tenant_share: float = 1.0

    @property
    def total_bytes(self) -> int:
        return self.window_bytes + self.reservoir_bytes + self.evaluation_bytes

    @classmethod
    def of(cls, max_bytes: int, *, max_tenant_share: float = 1.0) -> "ReplayLimits":
        """Half for the window, a tenth for held-out samples, the rest for the reservoirs."""
        window_bytes, evaluation_bytes = max_bytes // 2, max_bytes // 10
        return cls(
            window_bytes=window_bytes,
            reservoir_bytes=max_bytes - window_bytes - evaluation_bytes,
            evaluation_bytes=evaluation_bytes,
            max_tenant_share=max_tenant_share,
        )


@dataclass(slots=True)
class RetentionChanges:
    """Trace ids of samples that moved to a reservoir, and of those that were dropped."""

    moved: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def request_of(trace_id: str) -> str:
    """The trace id of the request that a sample is, or is a chunk of."""
    return trace_id.partition(CHUNK_MARK)[0]


def rank(trace_id: str) -> int:
    """A number that is uniform over trace ids, however they were generated."""
    return int.from_bytes(hashlib.blake2b(trace_id.encode(), digest_size=8).digest())


class _Heap:
    """The samples of one group in one pool, by priority."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._heap: list[tuple[int, SampleEntry]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, entry: SampleEntry) -> None:
        self.num_bytes += entry.num_bytes
        heapq.heappush(self._heap, (entry.priority, entry))

    @property
    def first(self) -> tuple[int, SampleEntry]:
        return self._heap[0]

    def pop(self) -> SampleEntry:
        _, entry = heapq.heappop(self._heap)
        self.num_bytes -= entry.num_bytes
        return entry

    def remove(self, entry: SampleEntry) -> None:
        self._heap.remove((entry.priority, entry))
        heapq.heapify(self._heap)
        self.num_bytes -= entry.num_bytes


class Retention:
    """The index of stored samples. `add` and `enforce` bring it within `limits`."""

    def __init__(self, limits: ReplayLimits, entries: Iterable[SampleEntry] = ()) -> None:
        self._limits = {
            Pool.WINDOW: limits.window_bytes,
            Pool.RESERVOIR: limits.reservoir_bytes,
            Pool.EVALUATION: limits.evaluation_bytes,
        }
        self._max_tenant_share = limits.max_tenant_share
        self._tenants: dict[Pool, Counter[str]] = {pool: Counter() for pool in Pool}
        """Bytes of each tenant's samples."""
        self._entries: dict[str, SampleEntry] = {}
        self._clusters: Counter[str] = Counter()
        self._heaps: dict[Pool, dict[str, _Heap]] = {pool: {} for pool in Pool}
        for entry in entries:
            self._put(entry)

    def __iter__(self) -> Iterator[SampleEntry]:
        return iter(self._entries.values())

    def __contains__(self, trace_id: object) -> bool:
        return trace_id in self._entries

    @property
    def clusters(self) -> Set[str]:
        """Those that have samples."""
        return self._clusters.keys()

    def num_samples(self, pool: Pool) -> int:
        return sum(map(len, self._heaps[pool].values()))

    def num_bytes(self, pool: Pool) -> int:
        return sum(heap.num_bytes for heap in self._heaps[pool].values())

    def add(self, entry: SampleEntry) -> RetentionChanges:
        """Add a sample and make room for it; it may be dropped itself."""
        self._put(entry)
        return self.enforce()

    def discard(self, trace_id: str) -> None:
        if entry := self._entries.get(trace_id):
            heaps = self._heaps[entry.pool]
            heaps[entry.group].remove(entry)
            if not heaps[entry.group]:
                del heaps[entry.group]
            self._forget(entry)

    def enforce(self) -> RetentionChanges:
        """Bring every pool within its limit: a tenant with more than its share shrinks first, then the largest group."""
        changes = RetentionChanges()
        for pool, limit in self._limits.items():  # the window first, because its samples move to a reservoir
            while self.num_bytes(pool) > limit:
                entry = self._pop(pool)
                if pool is Pool.WINDOW:
                    self._put(replace(entry, pool=Pool.RESERVOIR))
                    changes.moved.append(entry.trace_id)
                else:
                    changes.dropped.append(entry.trace_id)
        return changes

    def _pop(self, pool: Pool) -> SampleEntry:
        heaps = self._heaps[pool]
        if (of_tenant := self._of_greatest_tenant(pool)) is not None:
            self.discard(of_tenant.trace_id)
            return of_tenant
        group, *others = sorted(heaps, key=lambda group: -heaps[group].num_bytes)
        small = others[MAX_KINDS - 1 :]
        if sum(heaps[group].num_bytes for group in small) > heaps[group].num_bytes:
            group = min(small, key=lambda group: heaps[group].first)
        entry = heaps[group].pop()
        if not heaps[group]:
            del heaps[group]
        self._forget(entry)
        return entry

    def _of_greatest_tenant(self, pool: Pool) -> SampleEntry | None:
        """The sample that leaves first of a tenant with more than its share; None if none has."""
        sizes = self._tenants[pool]
        tenant, num_bytes = max(sizes.items(), key=lambda one: one[1], default=("", 0))
        if len(sizes) < 2 or num_bytes <= self._max_tenant_share * sizes.total():
            return None
        own = (entry for entry in self._entries.values() if entry.pool is pool and entry.tenant == tenant)
        return min(own, key=lambda entry: entry.priority)

    def _forget(self, entry: SampleEntry) -> None:
        del self._entries[entry.trace_id]
        sizes = self._tenants[entry.pool]
        sizes[entry.tenant] -= entry.num_bytes
        if not sizes[entry.tenant]:
            del sizes[entry.tenant]
        self._clusters[entry.cluster] -= 1
        if not self._clusters[entry.cluster]:
            del self._clusters[entry.cluster]

    def _put(self, entry: SampleEntry) -> None:
        self._entries[entry.trace_id] = entry
        self._tenants[entry.pool][entry.tenant] += entry.num_bytes
        self._clusters[entry.cluster] += 1
        self._heaps[entry.pool].setdefault(entry.group, _Heap()).push(entry)
