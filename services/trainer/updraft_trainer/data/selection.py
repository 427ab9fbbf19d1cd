"""Chooses the next samples to train and to evaluate on. Pure: randomness is an argument.

Half of a batch is fresh: the least used samples first, among those the newest, each at most `max_uses` times so that the draft
does not overfit them. The other half rehearses all clusters equally, so that a shift of the traffic does not erase what was
learned before (experience replay: Rolnick et al. 2019, arXiv 1811.11682). Rehearsal needs no limit of its own: it only
accompanies fresh samples, so it grows with new traffic and not with time.
"""

import heapq
import random
from collections.abc import Callable, Iterable, Mapping, Sequence

from updraft_trainer.data.retention import SampleEntry


def training_batch(
    entries: Sequence[SampleEntry], uses: Mapping[str, int], *, count: int, max_uses: int, rng: random.Random
) -> list[SampleEntry]:
    """Up to `count` distinct samples; empty without a fresh one. `entries` must not contain evaluation samples."""

    def num_uses(entry: SampleEntry) -> int:
        return uses.get(entry.trace_id, 0)

    fresh = [entry for entry in entries if num_uses(entry) < max_uses]
    if not fresh:
        return []
    batch = heapq.nsmallest((count + 1) // 2, fresh, key=lambda entry: (num_uses(entry), -entry.order))
    chosen = {entry.trace_id for entry in batch}
    rest = [entry for entry in entries if entry.trace_id not in chosen]
    rng.shuffle(rest)  # before a stable sort, so that ties are broken at random and not by age
    return batch + _round_robin(rest, count - len(batch), key=num_uses, rng=rng)


def closed_form_batch(
    entries: Sequence[SampleEntry], *, count: int, num_held_out: int
) -> tuple[list[SampleEntry], list[SampleEntry]]:
    """Up to `count` samples to fit, the newest of each cluster in turn, and the `num_held_out` newest of all to judge by."""
    newest_first = sorted(entries, key=lambda entry: -entry.order)
    fitted = _round_robin(newest_first[num_held_out:], count, key=lambda entry: -entry.order)
    return fitted, newest_first[:num_held_out]


def evaluation_batch(entries: Sequence[SampleEntry], *, count: int) -> list[SampleEntry]:
    """Up to `count` held-out samples: half are the newest, half the newest of each cluster in turn."""
    newest_first = sorted(entries, key=lambda entry: -entry.order)
    batch = newest_first[: (count + 1) // 2]
    rest = newest_first[len(batch) :]
    return batch + _round_robin(rest, count - len(batch), key=lambda entry: -entry.order)


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
