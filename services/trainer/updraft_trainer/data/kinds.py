"""One name for a kind of traffic whose requests several ranks store.

A domain has the same name everywhere. Clusters by content are each rank's own, but traces are spread over the ranks by a hash,
so clusters of one kind have nearly the same mean on all of them. Two are one kind if they are the most alike and alike enough;
those of one rank never are, because that rank has told them apart. Rejected: one clustering for all ranks, which would have to
answer before a rank may store a trace.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

from updraft_trainer.data.clusters import Feature

MIN_ALIKE = 0.85
"""Cosine between the means of one kind. The median sample has 0.74 to 0.84 to its kind's mean (see `clusters`), so means of
four samples, the fewest that are a kind, have about 0.87 to each other. Means of two kinds may come close to that, which
matters only for a kind that not all ranks have: the others have found their own before."""


def common_names(means: Sequence[Mapping[str, Feature]]) -> list[dict[str, str]]:
    """For each rank, the common name of each of its clusters. `means` has their means, of length 1, by rank.

    A kind has the name that it has at the lowest rank that knows it; the number of other ranks than 0 is part of it.
    """
    clusters = [(rank, name) for rank, of_rank in enumerate(means) for name in of_rank]
    kinds = {cluster: [cluster] for cluster in clusters}  # lists are shared by their members
    for _, one, other in _most_alike_first(means, clusters):
        both = kinds[one] + kinds[other]
        if len({rank for rank, _ in both}) == len(both):
            kinds.update(dict.fromkeys(both, both))
    names: list[dict[str, str]] = [{} for _ in means]
    for rank, name in clusters:
        names[rank][name] = _name(*min(kinds[rank, name], key=lambda cluster: cluster[0]))
    return names


def _most_alike_first(
    means: Sequence[Mapping[str, Feature]], clusters: Sequence[tuple[int, str]]
) -> list[tuple[float, tuple[int, str], tuple[int, str]]]:
    """Pairs of clusters of different ranks that are alike enough, with their cosines."""
    pairs = [
        (float(means[one[0]][one[1]] @ means[other[0]][other[1]]), one, other)
        for one, other in combinations(clusters, 2)
        if one[0] != other[0]
    ]
    return sorted((pair for pair in pairs if pair[0] >= MIN_ALIKE), key=lambda pair: -pair[0])


def _name(rank: int, name: str) -> str:
    return f"{name}@{rank}" if rank else name
