import random
from collections.abc import Mapping

import numpy as np

from updraft_trainer.data.clusters import FEATURE_SIZE, Feature, feature
from updraft_trainer.data.kinds import common_names
from updraft_trainer.data.selection import TrafficMix, mixed


def mean(kind: int, seed: int, num_samples: int) -> Feature:
    """Of samples whose tokens come from the same hundred of a thousand; kinds have other hundreds."""
    rng = random.Random(seed)
    total = np.zeros(FEATURE_SIZE, dtype=np.float32)
    for _ in range(num_samples):
        total = total + feature([100 * kind + int(rng.expovariate(0.05)) % 100 for _ in range(200)])
    normalised: Feature = (total / np.linalg.norm(total)).astype(np.float32)
    return normalised


def test_the_same_kinds_of_several_ranks_have_one_name_whatever_each_calls_them() -> None:
    names = common_names(
        [
            {"content:1": mean(0, 1, 20), "content:2": mean(1, 2, 20)},
            {"content:5": mean(1, 3, 20), "content:9": mean(0, 4, 20)},
            {"content:1": mean(1, 5, 20)},
        ]
    )
    assert names == [
        {"content:1": "content:1", "content:2": "content:2"},
        {"content:5": "content:2", "content:9": "content:1"},
        {"content:1": "content:2"},
    ]


def test_a_kind_that_only_another_rank_has_keeps_a_name_of_its_own() -> None:
    names = common_names([{"content:1": mean(0, 1, 20)}, {"content:1": mean(1, 2, 20)}])
    assert names == [{"content:1": "content:1"}, {"content:1": "content:1@1"}]


def test_clusters_that_one_rank_has_told_apart_stay_apart() -> None:
    alike: Mapping[str, Feature] = {"content:1": mean(0, 1, 20), "content:2": mean(0, 2, 20)}
    names = common_names([alike, {"content:3": mean(0, 3, 20)}])
    assert names[0] == {"content:1": "content:1", "content:2": "content:2"}
    assert names[1]["content:3"] in names[0].values()


def test_the_mix_of_several_ranks_is_that_of_their_requests_together() -> None:
    one = TrafficMix(
        kinds={"a": "content:1", "b": "domain:x"}, shares={"content:1": 0.5, "domain:x": 0.5}, num_recent=30
    )
    other = TrafficMix(kinds={"c": "content:7"}, shares={"content:7": 1.0}, num_recent=10)
    mix = mixed([one, other, TrafficMix()], [{}, {"content:7": "content:1"}, {}])
    assert mix.shares == {"content:1": 0.625, "domain:x": 0.375}
    assert mix.kinds == {"a": "content:1", "b": "domain:x", "c": "content:1"}
    assert mix.num_recent == 40


def test_ranks_without_any_request_have_an_empty_mix() -> None:
    assert mixed([TrafficMix(), TrafficMix()], [{}, {}]) == TrafficMix()
