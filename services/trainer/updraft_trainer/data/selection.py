"""Which samples to train and to evaluate on next. Pure: the randomness is an argument.

Half of a batch is fresh: the least used first, of those the newest, each at most `max_uses` times, so that nothing is
learnt by heart. The other half is rehearsal over all clusters alike, so that a shift does not cost what was learnt
before (experience replay: Rolnick et al. 2019, arXiv 1811.11682). Rehearsal has no bound of its own: it only ever
accompanies fresh samples, so its uses grow with new traffic and not with time.
"""

import heapq
import random
from collections.abc import Callable, Iterable, Mapping, Sequence

from updraft_trainer.data.retention import SampleEntry


def training_batch(
    kept: Sequence[SampleEntry], uses: Mapping[str, int], *, count: int, max_uses: int, rng: random.Random
) -> list[SampleEntry]:
    """Up to `count` distinct samples, empty without a fresh one. `kept` holds no evaluation samples."""

    def num_uses(one: SampleEntry) -> int:
        return uses.get(one.trace_id, 0)

    fresh = [one for one in kept if num_uses(one) < max_uses]
    if not fresh:
        return []
    batch = heapq.nsmallest((count + 1) // 2, fresh, key=lambda one: (num_uses(one), -one.order))
    taken = {one.trace_id for one in batch}
    rest = [one for one in kept if one.trace_id not in taken]
    rng.shuffle(rest)  # before a stable sort: ties are drawn, not aged
    return batch + _round_robin(rest, count - len(batch), key=num_uses, rng=rng)


def evaluation_batch(kept: Sequence[SampleEntry], *, count: int) -> list[SampleEntry]:
    """Up to `count` held-out samples: half are the newest, half the newest of each cluster in turn."""
    newest_first = sorted(kept, key=lambda one: -one.order)
    batch = newest_first[: (count + 1) // 2]
    rest = newest_first[len(batch) :]
    return batch + _round_robin(rest, count - len(batch), key=lambda one: -one.order)


def _round_robin(
    kept: Iterable[SampleEntry], count: int, *, key: Callable[[SampleEntry], int], rng: random.Random | None = None
) -> list[SampleEntry]:
    """Up to `count` samples, one a cluster in turn, in order of `key` within the cluster."""
    clusters: dict[str, list[SampleEntry]] = {}
    for one in sorted(kept, key=key):
        clusters.setdefault(one.cluster, []).append(one)
    queues = list(clusters.values())
    if rng is not None:
        rng.shuffle(queues)  # an odd batch must not always favour the same cluster
    longest = max(map(len, queues), default=0)
    turns = (queue[turn] for turn in range(longest) for queue in queues if turn < len(queue))
    return [one for one, _ in zip(turns, range(count), strict=False)]
