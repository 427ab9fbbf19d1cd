"""Keeps replay within its size: a window of the newest samples, a sample of everything older, and held-out samples.

A sample that leaves the window joins its cluster's reservoir, which is a uniform sample of everything that ever left. Each
trace has a rank, the hash of its id, and the lowest ranks are kept. This is reservoir sampling by random keys (Efraimidis and
Spirakis 2006, with equal weights), the variant of Vitter's algorithm R (1985) whose capacity may shrink: clusters share the
bytes, and a new cluster takes from the largest one. The smallest clusters share as one, because over time any number of
outliers come, and would otherwise leave kinds no more than an outlier has. It needs no counter and survives restarts.

A tenant with more than its share of a pool makes room within its own clusters. It competes there with what absent tenants have
left, who have sent nothing for days: what they had is kept as long as traffic that nobody owns, and not for ever.
Pure: it returns what to move and drop, and uses neither files nor tensors.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import StrEnum

MAX_KINDS = 32
"""So many clusters, the largest, count as kinds of traffic: as many as can take new samples at one time."""

PRESENT = timedelta(days=3)
"""A tenant that has sent nothing for so long is absent: no share protects it. It outlasts a weekend."""

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
    expires_ms: int = 0
    """When its tenant wants it deleted, in Unix milliseconds; 0: never."""

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


def absent_tenants(newest_ms: Mapping[str, int]) -> set[str]:
    """Those whose newest request ended `PRESENT` before the newest of all. `newest_ms`: by tenant, in Unix milliseconds."""
    since_ms = max(newest_ms.values(), default=0) - PRESENT // timedelta(milliseconds=1)
    return {tenant for tenant, ms in newest_ms.items() if ms < since_ms}


class _Heap:
    """The samples of one tenant and group in one pool, by priority."""

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

    def remove(self, trace_ids: Set[str]) -> None:
        self._heap = [one for one in self._heap if one[1].trace_id not in trace_ids]
        heapq.heapify(self._heap)
        self.num_bytes = sum(entry.num_bytes for _, entry in self._heap)


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
        self._newest_ms: dict[str, int] = {}
        """When the newest request of each tenant with samples ended."""
        self._entries: dict[str, SampleEntry] = {}
        self._clusters: Counter[str] = Counter()
        self._heaps: dict[Pool, dict[tuple[str, str], _Heap]] = {pool: {} for pool in Pool}
        """By tenant and group."""
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
        return self._tenants[pool].total()

    def add(self, entry: SampleEntry) -> RetentionChanges:
        """Add a sample and make room for it; it may be dropped itself."""
        self._put(entry)
        return self.enforce()

    def discard(self, trace_ids: Iterable[str]) -> None:
        """Remove those of these samples that are there."""
        places: dict[tuple[Pool, str, str], list[SampleEntry]] = {}
        for entry in filter(None, map(self._entries.get, set(trace_ids))):
            places.setdefault((entry.pool, entry.tenant, entry.group), []).append(entry)
        for (pool, tenant, group), gone in places.items():
            self._heaps[pool][tenant, group].remove({entry.trace_id for entry in gone})
            for entry in gone:
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
        heaps = self._competing(pool)
        sizes = Counter[str]()
        for (_, group), heap in heaps.items():
            sizes[group] += heap.num_bytes
        (group, largest), *others = sizes.most_common()
        small = dict(others[MAX_KINDS - 1 :])
        among = small if sum(small.values()) > largest else {group}
        key = min((key for key in heaps if key[1] in among), key=lambda key: heaps[key].first)
        entry = heaps[key].pop()
        self._forget(entry)
        return entry

    def _competing(self, pool: Pool) -> dict[tuple[str, str], _Heap]:
        """The samples of which one leaves: of the tenant that has more than its share, and of absent ones; all if none has."""
        heaps, absent = self._heaps[pool], absent_tenants(self._newest_ms)
        sizes = Counter({tenant: size for tenant, size in self._tenants[pool].items() if tenant not in absent})
        if self._max_tenant_share >= 1 or len(sizes) < 2:
            return heaps
        ((greatest, num_bytes),) = sizes.most_common(1)
        if num_bytes <= self._max_tenant_share * sizes.total():
            return heaps
        return {key: heap for key, heap in heaps.items() if key[0] == greatest or key[0] in absent}

    def _forget(self, entry: SampleEntry) -> None:
        del self._entries[entry.trace_id]
        _take(self._tenants[entry.pool], entry.tenant, entry.num_bytes)
        _take(self._clusters, entry.cluster, 1)
        heaps = self._heaps[entry.pool]
        key = entry.tenant, entry.group
        if key in heaps and not heaps[key]:
            del heaps[key]
        if not any(entry.tenant in sizes for sizes in self._tenants.values()):
            del self._newest_ms[entry.tenant]

    def _put(self, entry: SampleEntry) -> None:
        self._entries[entry.trace_id] = entry
        self._tenants[entry.pool][entry.tenant] += entry.num_bytes
        self._newest_ms[entry.tenant] = max(entry.finished_ms, self._newest_ms.get(entry.tenant, 0))
        self._clusters[entry.cluster] += 1
        self._heaps[entry.pool].setdefault((entry.tenant, entry.group), _Heap()).push(entry)


def _take(counts: Counter[str], key: str, number: int) -> None:
    counts[key] -= number
    if not counts[key]:
        del counts[key]
