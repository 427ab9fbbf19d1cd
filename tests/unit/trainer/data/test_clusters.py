import random
from collections import Counter
from itertools import count

import pytest

from updraft_rollouts.evidence import MIN_KIND_SAMPLES
from updraft_trainer.data.clusters import MAX_CLUSTERS, Clusters, feature


class Arrivals:
    """Requests as they come, each with the next number."""

    def __init__(self) -> None:
        self.clusters = Clusters()
        self._orders = count(1)

    def assign(self, domain: str, ids: list[int]) -> str:
        return self.clusters.assign(domain, ids, order=next(self._orders))


def text(low: int, high: int, seed: int, length: int = 200) -> list[int]:
    """Tokens from a range, the lower ones more often, as in any text."""
    rng = random.Random(seed)
    return [low + int((high - low) * rng.random() ** 5) for _ in range(length)]


def test_two_kinds_of_text_without_names_get_two_clusters() -> None:
    clusters = Arrivals()
    old = {clusters.assign("", text(0, 300, seed)) for seed in range(50)}
    new = {clusters.assign("", text(5000, 5300, seed)) for seed in range(50)}
    assert len(old) == 1
    assert len(new) == 1
    assert old != new


def outlier(n: int) -> list[int]:
    """Unlike any other, and unlike any kind."""
    return random.Random(n).sample(range(100_000, 200_000), 12)


def test_a_new_kind_gets_a_cluster_of_its_own_though_outliers_have_taken_all() -> None:
    clusters = Arrivals()
    old = {clusters.assign("", text(0, 300, seed)) for seed in range(20)}
    outliers = [clusters.assign("", outlier(n)) for n in range(2 * MAX_CLUSTERS)]
    (new,) = {clusters.assign("", text(5000, 5300, seed)) for seed in range(20)}
    assert {new}.isdisjoint({*old, *outliers})
    assert {clusters.assign("", text(0, 300, 20))} == old


def test_outliers_do_not_pile_up_under_one_name() -> None:
    clusters = Arrivals()
    kind = {clusters.assign("", text(0, 300, seed)) for seed in range(20)}
    names = Counter(clusters.assign("", outlier(n)) for n in range(150))
    assert kind.isdisjoint(names)
    assert max(names.values()) < MIN_KIND_SAMPLES
    assert len(clusters.clusters.by_content) == MAX_CLUSTERS


def test_a_rare_kind_lasts_while_outliers_give_way_to_each_other() -> None:
    clusters, rare = Arrivals(), Counter[str]()
    for n in range(150):
        if n % 10 == 0:
            rare[clusters.assign("", text(0, 300, n))] += 1
        clusters.assign("", outlier(n))
    assert len(rare) == 1


def test_a_kind_of_many_samples_gives_way_to_nothing() -> None:
    clusters = Arrivals()
    kinds = [
        {clusters.assign("", text(500 * n, 500 * n + 300, seed)) for seed in range(10)} for n in range(MAX_CLUSTERS)
    ]
    more = {clusters.assign("", text(20_000, 20_300, seed)) for seed in range(10)}
    assert len(more) == 1
    assert more < set().union(*kinds)
    for n, kind in enumerate(kinds):
        assert {clusters.assign("", text(500 * n, 500 * n + 300, 11))} == kind


def test_the_callers_name_comes_before_the_content() -> None:
    clusters = Arrivals()
    assert clusters.assign("code", text(0, 300, 1)) == clusters.assign("code", text(5000, 5300, 1))
    assert clusters.assign("code", text(0, 300, 1)) != clusters.assign("chat", text(0, 300, 1))


@pytest.mark.attack(boundary="traces", attack="hundreds of invented domains", outcome="a bounded number of clusters")
def test_any_number_of_names_makes_a_bounded_number_of_clusters() -> None:
    clusters = Arrivals()
    for n in range(500):
        clusters.assign(f"tenant-{n}", text(n * 100, n * 100 + 50, n))
    assert len(clusters.clusters.named) == len(clusters.clusters.by_content) == MAX_CLUSTERS


def test_a_cluster_without_samples_makes_room() -> None:
    clusters = Arrivals()
    first = clusters.assign("", text(0, 300, 1))
    second = clusters.assign("", text(5000, 5300, 1))
    clusters.clusters.keep_only({second})
    assert clusters.assign("", text(9000, 9300, 1)) not in {first, second}
    assert set(clusters.clusters.by_content) == {second, "content:3"}
    assert clusters.assign("", text(5000, 5300, 2)) == second


def test_a_feature_has_length_one_also_of_no_tokens_at_all() -> None:
    assert abs(float(feature([1, 2, 2**31, 5]) @ feature([1, 2, 2**31, 5])) - 1.0) < 1e-5
    assert float(feature([]).sum()) == 0.0
