"""Chooses the next samples to train and to evaluate on. Pure: randomness is an argument.

A batch has a budget of tokens, because requests differ in length by a hundred times, and with them what a step costs and how
much it teaches. Half of a batch is fresh: the least used samples first, among those the newest, each at most `max_uses` times
so that the draft does not overfit them. The other half rehearses all clusters equally, so that a shift of the traffic does not
erase what was learned before (experience replay: Rolnick et al. 2019, arXiv 1811.11682). Rehearsal needs no limit of its own:
it only accompanies fresh samples, so it grows with new traffic and not with time.

The newest requests wait while others are fresh. Until they are trained on, they judge the draft next to the held-out ones,
which are few when traffic is new. A request waits or judges as a whole: its chunks are alike, so one that was trained on tells
how well the draft knows the others by heart.

No tenant has more than a share of what is chosen while there are samples of others (`max_share`), so nobody decides alone what
a draft learns or how it is judged, however much they send. What others have left is no reason to learn it by heart, or to take
it for today's traffic: see `without_absent`, `MAX_REHEARSALS` and `RECENT`.
"""

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import islice

from updraft_rollouts.evidence import MIN_KIND_SAMPLES, OUTLIERS
from updraft_trainer.data import importance
from updraft_trainer.data.retention import MAX_KINDS, SampleEntry, absent_tenants, rank, request_of

NUM_RECENT = 64
"""Requests that are today's traffic: few enough to follow a shift soon, enough to know shares to a few percent. With 32, drafts
that had lost 7 % in old kinds were published."""

RECENT = timedelta(days=1)
"""Older requests are today's traffic only if they are among the newest of all tenants."""

MAX_REHEARSALS = 4
"""So many times `max_uses`, a sample may be drawn because its tenant has had less than others. From then on it has a turn as if
nobody owned it: few samples of one tenant would otherwise be in each batch, and be learned by heart."""

USUAL_SAMPLES = 4
"""Samples of a batch without a budget, on average. All defaults of learning were chosen with as many."""

NUM_REMEMBERED = 5_000
"""Requests without a kind of traffic after which it is not judged any more: a draft may then forget it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficMix:
    """Kinds of traffic: of each stored request, by trace id, and each kind's share of today's requests.

    A kind is a cluster, or all outliers together. Held-out requests are one in ten, so shares come from all requests.
    """

    kinds: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    num_recent: int = 0
    """Today's requests, which the shares are of."""

    def weights(self, trace_ids: Sequence[str]) -> list[float]:
        """The weight of each of these requests in today's traffic: 1 on average, if they are of all of today's kinds."""
        counts = Counter(self.kinds.get(trace_id, "") for trace_id in trace_ids)
        kinds = (self.kinds.get(trace_id, "") for trace_id in trace_ids)
        return [len(trace_ids) * self.shares.get(kind, 0.0) / counts[kind] for kind in kinds]


def outliers_together(entries: Sequence[SampleEntry]) -> list[SampleEntry]:
    """The same samples, those of clusters of a few in one cluster. An outlier with a turn of its own would crowd out kinds, and
    with its own share of traffic it would stand for nothing but itself."""
    largest = Counter(entry.cluster for entry in entries).most_common(MAX_KINDS)
    kinds = {cluster for cluster, size in largest if size >= MIN_KIND_SAMPLES}
    return [entry if entry.cluster in kinds else replace(entry, cluster=OUTLIERS) for entry in entries]


def one_per_request(entries: Iterable[SampleEntry]) -> list[SampleEntry]:
    """A chunk of each request, chosen by chance: chunks of one request are alike, and would pass for as many requests."""
    chosen: dict[str, SampleEntry] = {}
    for entry in entries:
        other = chosen.setdefault(entry.request, entry)
        if rank(entry.trace_id) < rank(other.trace_id):
            chosen[entry.request] = entry
    return list(chosen.values())


def limited(
    entries: Iterable[SampleEntry],
    max_share: float,
    *,
    size: Callable[[SampleEntry], float] = lambda _: 1.0,
    taken: Mapping[str, float] = {},
) -> Iterator[SampleEntry]:
    """The same samples, in their order but for tenants who would have more than `max_share` of those before and this one: they
    wait for others, while there are any. `taken` has the sizes that tenants have had before."""
    entries = list(entries)
    queues: dict[str, deque[tuple[int, SampleEntry]]] = {}
    for place, entry in enumerate(entries):
        queues.setdefault(entry.tenant, deque()).append((place, entry))
    if max_share >= 1 or len(queues) < 2:
        yield from entries
        return
    heads = [(queue[0][0], tenant) for tenant, queue in queues.items()]
    used, total = dict(taken), sum(taken.values())

    def is_allowed(tenant: str) -> bool:
        num = size(queues[tenant][0][1])
        return used.get(tenant, 0.0) + num <= max_share * (total + num)

    while len(heads) > 1:
        tenant = _next_tenant(heads, is_allowed, used)
        _, entry = queues[tenant].popleft()
        if queues[tenant]:
            heapq.heappush(heads, (queues[tenant][0][0], tenant))
        used[tenant], total = used.get(tenant, 0.0) + size(entry), total + size(entry)
        yield entry
    yield from (entry for _, tenant in heads for _, entry in queues[tenant])


def _next_tenant(heads: list[tuple[int, str]], is_allowed: Callable[[str], bool], used: Mapping[str, float]) -> str:
    """Take from this heap the first place whose tenant is allowed; if none is, that of the tenant that has had least. Few are
    not allowed at a time, as shares add up to 1."""
    waiting: list[tuple[int, str]] = []
    while heads and not is_allowed(heads[0][1]):
        waiting.append(heapq.heappop(heads))
    if heads:
        _, tenant = heapq.heappop(heads)
    else:
        least = min(waiting, key=lambda head: (used.get(head[1], 0.0), head[0]))
        waiting.remove(least)
        _, tenant = least
    for head in waiting:
        heapq.heappush(heads, head)
    return tenant


def without_absent(entries: Sequence[SampleEntry]) -> Sequence[SampleEntry]:
    """The same samples. Those of absent tenants count as the greatest other's, so that no share protects them."""
    newest_ms: dict[str, int] = {}
    for entry in entries:
        newest_ms[entry.tenant] = max(entry.finished_ms, newest_ms.get(entry.tenant, 0))
    absent = absent_tenants(newest_ms)
    if not absent:
        return entries
    present = Counter(entry.tenant for entry in entries if entry.tenant not in absent)
    return _counted_as(max(present, key=present.__getitem__), entries, lambda entry: entry.tenant in absent)


def _counted_as(tenant: str, entries: Iterable[SampleEntry], is_so: Callable[[SampleEntry], bool]) -> list[SampleEntry]:
    return [replace(entry, tenant=tenant) if is_so(entry) else entry for entry in entries]


def _num_tokens(entry: SampleEntry) -> float:
    return float(entry.num_tokens)


def newest_requests(entries: Iterable[SampleEntry], count: int, *, max_share: float = 1.0) -> set[str]:
    """The `count` requests that came last, by the first of their chunks, so that a long one does not become new again."""
    first: dict[str, SampleEntry] = {}
    for entry in entries:
        known = first.setdefault(entry.request, entry)
        if entry.order < known.order:
            first[entry.request] = entry
    newest_first = sorted(first.values(), key=lambda entry: -entry.order)
    return {entry.request for entry in islice(limited(newest_first, max_share), count)}


def traffic_mix(entries: Iterable[SampleEntry], *, max_share: float = 1.0) -> TrafficMix:
    """The mix of all stored requests, of which the newest are today's traffic, however likely they were to be captured. Kinds
    that nobody is judged by any more are none of it: they would be a part that no evaluation covers."""
    entries = list(entries)
    newest_first = sorted(one_per_request(remembered(entries)), key=lambda entry: -entry.order)
    recent = list(islice(limited(_recent(newest_first), max_share), NUM_RECENT))
    shares: dict[str, float] = {}
    for entry, weight in zip(recent, importance.weights([entry.probability for entry in recent]), strict=True):
        shares[entry.cluster] = shares.get(entry.cluster, 0.0) + weight / len(recent)
    kinds = {entry.trace_id: entry.cluster for entry in entries}
    return TrafficMix(kinds=kinds, shares=shares, num_recent=len(recent))


def _recent(newest_first: Sequence[SampleEntry]) -> list[SampleEntry]:
    newest_ms = max((entry.finished_ms for entry in newest_first), default=0)
    since_ms = newest_ms - RECENT // timedelta(milliseconds=1)
    older = (entry for entry in newest_first[NUM_RECENT:] if entry.finished_ms >= since_ms)
    return [*newest_first[:NUM_RECENT], *older]


def mixed(mixes: Sequence[TrafficMix], names: Sequence[Mapping[str, str]]) -> TrafficMix:
    """The mix of the requests of several ranks. `names` has each rank's kinds whose name is another one in all of them."""
    num_recent = sum(mix.num_recent for mix in mixes)
    shares: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for mix, common in zip(mixes, names, strict=True):
        kinds |= {id_: common.get(kind, kind) for id_, kind in mix.kinds.items()}
        for kind, share in mix.shares.items():
            name = common.get(kind, kind)
            shares[name] = shares.get(name, 0.0) + share * mix.num_recent / num_recent
    return TrafficMix(kinds=kinds, shares=shares, num_recent=num_recent)


def training_batch(  # noqa: PLR0913 - what is stored, what was used, and four limits
    entries: Sequence[SampleEntry],
    uses: Mapping[str, int],
    *,
    num_tokens: int | None = None,
    max_uses: int,
    rng: random.Random,
    num_waiting: int = 0,
    max_share: float = 1.0,
    drawn: Mapping[str, float] = {},
) -> list[SampleEntry]:
    """Distinct samples of about `num_tokens`; empty without a fresh one. `entries` must not contain evaluation samples.

    None: as many tokens as `USUAL_SAMPLES` have on average. The last sample of each half is taken if half of it fits, so that
    halves have their size on average. One sample of each is taken in any case, so a long one may exceed the budget; but a
    fresh one may fill the whole batch.

    The `num_waiting` newest requests, at most half of all, are left out while there is a fresh sample of another one.
    `drawn`: tokens of tenants in earlier batches, because a batch of a few samples cannot keep shares by itself.
    """

    def num_uses(entry: SampleEntry) -> int:
        return uses.get(entry.trace_id, 0)

    num_waiting = min(num_waiting, len({entry.request for entry in entries}) // 2)
    waiting = newest_requests(entries, num_waiting, max_share=max_share)
    fresh = [entry for entry in entries if num_uses(entry) < max_uses]
    if not fresh:
        return []
    if any(entry.request not in waiting for entry in fresh):
        entries = [entry for entry in entries if entry.request not in waiting]
        fresh = [entry for entry in fresh if entry.request not in waiting]
    fresh.sort(key=lambda entry: (num_uses(entry), -entry.order))
    budget = num_tokens or USUAL_SAMPLES * sum(entry.num_tokens for entry in entries) / len(entries)
    if max_share < 1 and len({entry.tenant for entry in entries}) > 1:
        # Where only one tenant is fresh, samples of others fill up its half, as long as they are protected.
        stale = (entry for entry in entries if max_uses <= num_uses(entry) < MAX_REHEARSALS * max_uses)
        fresh += sorted(stale, key=lambda entry: (num_uses(entry), -entry.order))
    batch = _within(limited(fresh, max_share, size=_num_tokens, taken=drawn), budget / 2)
    chosen = {entry.trace_id for entry in batch}
    rest = [entry for entry in outliers_together(entries) if entry.trace_id not in chosen]
    drawn = tokens_by_tenant(batch, drawn)
    if max_share < 1:
        most = max(drawn, key=drawn.__getitem__)
        rest = _counted_as(most, rest, lambda entry: num_uses(entry) >= MAX_REHEARSALS * max_uses)
    rng.shuffle(rest)  # before a stable sort, so that ties are broken at random and not by age
    turns = _round_robin(rest, len(rest), key=num_uses, rng=rng)
    limited_turns = limited(turns, max_share, size=_num_tokens, taken=drawn)
    return batch + _within(limited_turns, budget - sum(entry.num_tokens for entry in batch))


def tokens_by_tenant(batch: Iterable[SampleEntry], before: Mapping[str, float]) -> dict[str, float]:
    """Captured tokens of each tenant's samples in a batch, added to those before."""
    tokens = dict(before)
    for entry in batch:
        tokens[entry.tenant] = tokens.get(entry.tenant, 0.0) + entry.num_tokens
    return tokens


def _within(entries: Iterable[SampleEntry], num_tokens: float) -> list[SampleEntry]:
    """The first samples of so many tokens, as long as half of the next one fits. At least one, if there is any room: without
    it, kinds of which no request fits would never be rehearsed."""
    batch, total = list[SampleEntry](), 0
    for entry in entries:
        if total >= num_tokens or (batch and total + entry.num_tokens / 2 > num_tokens):
            break
        batch.append(entry)
        total += entry.num_tokens
    return batch


def first_batch(
    entries: Sequence[SampleEntry], *, count: int, rng: random.Random, max_share: float = 1.0
) -> list[SampleEntry]:
    """One sample of each of up to `count` requests, of the clusters in turn: these teach more than all chunks of few."""
    samples = one_per_request(outliers_together(entries))
    rng.shuffle(samples)
    turns = _round_robin(samples, len(samples), key=lambda _: 0, rng=rng)
    return list(islice(limited(turns, max_share), count))


def closed_form_batch(
    entries: Sequence[SampleEntry], *, count: int, num_held_out: int, max_share: float = 1.0
) -> tuple[list[SampleEntry], list[SampleEntry]]:
    """Up to `count` samples to fit, the newest of each cluster in turn, and one of each of the `num_held_out` newest requests
    to judge by, of which none is fitted."""
    judging = newest_requests(entries, num_held_out, max_share=max_share)
    newest_first = sorted(outliers_together(entries), key=lambda entry: -entry.order)
    fitted = [entry for entry in newest_first if entry.request not in judging]
    held_out = one_per_request(entry for entry in newest_first if entry.request in judging)
    turns = _round_robin(fitted, len(fitted), key=lambda entry: -entry.order)
    return list(islice(limited(turns, max_share), count)), held_out


def untrained_batch(
    entries: Sequence[SampleEntry], uses: Mapping[str, int], *, count: int, max_share: float = 1.0
) -> list[SampleEntry]:
    """One sample of each of the newest requests of which nothing was trained on yet."""
    trained = {request_of(trace_id) for trace_id, num_uses in uses.items() if num_uses}
    untrained = [entry for entry in entries if entry.request not in trained]
    chosen = newest_requests(untrained, count, max_share=max_share)
    batch = one_per_request(entry for entry in untrained if entry.request in chosen)
    return sorted(batch, key=lambda entry: -entry.order)


def trained_batch(entries: Sequence[SampleEntry], uses: Mapping[str, int], *, count: int) -> list[SampleEntry]:
    """The newest samples that were trained on, one of each request."""
    trained = one_per_request(entry for entry in entries if uses.get(entry.trace_id))
    return heapq.nlargest(count, trained, key=lambda entry: entry.order)


def remembered(entries: Sequence[SampleEntry]) -> list[SampleEntry]:
    """The samples of kinds that have been seen among the last `NUM_REMEMBERED` requests, which came in as many chunks each as
    those that are stored."""
    last = {entry.cluster: entry.order for entry in sorted(entries, key=lambda entry: entry.order)}
    newest = max(last.values(), default=0)
    num_requests = len({entry.request for entry in entries})
    return [entry for entry in entries if (newest - last[entry.cluster]) * num_requests < NUM_REMEMBERED * len(entries)]


def evaluation_batch(entries: Sequence[SampleEntry], *, count: int, max_share: float = 1.0) -> list[SampleEntry]:
    """About `count` held-out samples, one of each request: half are the newest, half the newest of each cluster in turn.

    There are more than `count` if a cluster would otherwise have fewer than its own verdict needs.
    """
    newest_first = list(limited(sorted(one_per_request(entries), key=lambda entry: -entry.order), max_share))
    batch = newest_first[: (count + 1) // 2]
    rest = newest_first[len(batch) :]
    turns = _round_robin(rest, len(rest), key=lambda entry: -entry.order)
    taken = Counter(entry.tenant for entry in batch)
    batch += islice(limited(turns, max_share, taken=taken), count - len(batch))
    taken = Counter(entry.cluster for entry in batch)
    chosen = {entry.trace_id for entry in batch}
    for entry in rest:
        if entry.trace_id not in chosen and taken[entry.cluster] < MIN_KIND_SAMPLES:
            taken[entry.cluster] += 1
            batch.append(entry)
    return batch


def _round_robin(
    entries: Iterable[SampleEntry],
    count: int,
    *,
    key: Callable[[SampleEntry], int],
    rng: random.Random | None = None,
) -> list[SampleEntry]:
    """Up to `count` samples, one per cluster in turn, in order of `key` within a cluster."""
    clusters: dict[str, list[SampleEntry]] = {}
    for entry in sorted(entries, key=key):
        clusters.setdefault(entry.cluster, []).append(entry)
    queues = list(clusters.values())
    if rng is not None:
        rng.shuffle(queues)  # otherwise an odd batch would always favour the same cluster
    longest = max(map(len, queues), default=0)
    turns = (queue[turn] for turn in range(longest) for queue in queues if turn < len(queue))
    return [entry for entry, _ in zip(turns, range(count), strict=False)]
