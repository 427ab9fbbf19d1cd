import random

from updraft_trainer.data.clusters import MAX_CLUSTERS, Clusters, feature


def text(low: int, high: int, seed: int, length: int = 200) -> list[int]:
    """Tokens from a range, the lower ones more often, as in any text."""
    rng = random.Random(seed)
    return [low + int((high - low) * rng.random() ** 5) for _ in range(length)]


def test_two_kinds_of_text_without_names_get_two_clusters() -> None:
    clusters = Clusters()
    old = {clusters.assign("", text(0, 300, seed)) for seed in range(50)}
    new = {clusters.assign("", text(5000, 5300, seed)) for seed in range(50)}
    assert len(old) == 1
    assert len(new) == 1
    assert old != new


def test_a_new_kind_gets_a_cluster_though_outliers_have_taken_all() -> None:
    clusters = Clusters()
    old = {clusters.assign("", text(0, 300, seed)) for seed in range(20)}
    outliers = [clusters.assign("", text(9_000 + 500 * n, 9_300 + 500 * n, n)) for n in range(2 * MAX_CLUSTERS)]
    assert len(set(outliers)) == MAX_CLUSTERS - 1
    (new,) = {clusters.assign("", text(5000, 5300, seed)) for seed in range(20)}
    assert {new}.isdisjoint(old)


def test_a_kind_of_many_samples_gives_way_to_nothing() -> None:
    clusters = Clusters()
    kinds = [
        {clusters.assign("", text(500 * n, 500 * n + 300, seed)) for seed in range(10)} for n in range(MAX_CLUSTERS)
    ]
    more = {clusters.assign("", text(20_000, 20_300, seed)) for seed in range(10)}
    assert len(more) == 1
    assert more < set().union(*kinds)
    for n, kind in enumerate(kinds):
        assert {clusters.assign("", text(500 * n, 500 * n + 300, 11))} == kind


def test_the_callers_name_comes_before_the_content() -> None:
    clusters = Clusters()
    assert clusters.assign("code", text(0, 300, 1)) == clusters.assign("code", text(5000, 5300, 1))
    assert clusters.assign("code", text(0, 300, 1)) != clusters.assign("chat", text(0, 300, 1))


def test_any_number_of_names_makes_a_bounded_number_of_clusters() -> None:
    clusters = Clusters()
    names = {clusters.assign(f"tenant-{n}", text(n * 100, n * 100 + 50, n)) for n in range(500)}
    assert len(names) <= 2 * MAX_CLUSTERS


def test_a_cluster_without_samples_makes_room() -> None:
    clusters = Clusters()
    first = clusters.assign("", text(0, 300, 1))
    second = clusters.assign("", text(5000, 5300, 1))
    clusters.keep_only({second})
    assert clusters.assign("", text(9000, 9300, 1)) == first
    assert clusters.assign("", text(5000, 5300, 2)) == second


def test_a_feature_has_length_one_also_of_no_tokens_at_all() -> None:
    assert abs(float(feature([1, 2, 2**31, 5]) @ feature([1, 2, 2**31, 5])) - 1.0) < 1e-5
    assert float(feature([]).sum()) == 0.0
