"""Which pod gets which order, and how many are between two versions at once."""

from dataclasses import replace

import pytest
from tests.support.rollouts import World
from tests.support.versions import holding, refusing, version

from updraft_registry.rollout.placement import Pod, share
from updraft_rollouts.terms import Strategy


@pytest.mark.parametrize(
    ("percent", "num_pods", "keeps_one", "expected"),
    [
        pytest.param(10, 16, True, 2, id="rounded up"),
        pytest.param(1, 1000, True, 10, id="of many"),
        pytest.param(1, 3, True, 1, id="at least one"),
        pytest.param(100, 16, True, 15, id="one is left to compare with"),
        pytest.param(50, 1, True, 0, id="a single one cannot be compared with another"),
        pytest.param(50, 0, True, 0, id="no pods"),
        pytest.param(10, 1, False, 1, id="a pod that is compared with itself"),
        pytest.param(100, 2, False, 2, id="all of them"),
        pytest.param(10, 0, False, 0, id="no pods to compare with themselves"),
    ],
)
def test_a_step_is_on_its_share_of_the_pods(percent: int, num_pods: int, *, keeps_one: bool, expected: int) -> None:
    assert share(percent, num_pods, keeps_one=keeps_one) == expected


def promoting(num_pods: int, *, limit: int) -> World:
    """Version 2 has just become stable."""
    world = World(num_pods, strategy=Strategy.IMMEDIATE, max_pods_swapping=limit)
    world.publish()
    return world


def test_a_promotion_moves_as_many_pods_at_once_as_the_policy_says() -> None:
    world = promoting(8, limit=3)
    waves = []
    while world.directed(1):
        waves.append(len(world.directed(2)))
        world.obey()
        world.decide()
    assert waves == [3, 6]
    assert world.directed(2) == set(world.pods)


def test_a_pod_that_waits_for_its_turn_serves_what_it_holds_and_fetches_what_comes() -> None:
    world = promoting(4, limit=1)
    order = world.decision.directives["pod-03"]
    assert (order.serve, order.prefetch) == (1, (1, 2))
    assert order.reason == "version 2 takes over on a few pods at a time"


def test_without_a_limit_all_move_at_once() -> None:
    assert len(promoting(8, limit=0).directed(2)) == 8


def test_a_pod_that_is_moving_keeps_its_turn_whoever_comes() -> None:
    world = promoting(4, limit=1)
    assert world.directed(2) == {"pod-00"}
    world.pods = {"a-new-pod": holding("a-new-pod", version(1)), **world.pods}
    world.decide()
    assert world.directed(2) == {"pod-00"}


def test_a_pod_that_refused_takes_no_turn() -> None:
    world = promoting(8, limit=2)
    world.obey(["pod-01"])
    world.decide()
    world.obey(["pod-02"])
    world.pods["pod-00"] = refusing("pod-00", 2, loaded=version(1))
    world.decide()
    assert world.directed(2) == {f"pod-{i:02}" for i in range(5)}


def test_a_pod_with_troubles_of_its_own_keeps_no_other_from_its_turn() -> None:
    world = promoting(4, limit=1)
    for turn in range(1, 4):
        world.pods["pod-00"] = replace(world.pods["pod-00"], trouble="not yet: no space left on device")
        world.decide()
        assert world.directed(2) == {f"pod-{i:02}" for i in range(1, turn + 1)}
        world.obey([f"pod-{turn:02}"])
    world.decide()
    assert world.directed(2) == set(world.pods), "its own turn is the last one"


@pytest.mark.parametrize(
    "pod",
    [
        pytest.param(Pod(name="new"), id="without a draft"),
        pytest.param(Pod(name="new", loaded=9, tensors_digest="sha256:9"), id="with one that nobody knows"),
        pytest.param(Pod(name="new", loaded=1, tensors_digest="sha256:other"), id="with other tensors"),
    ],
)
def test_a_pod_with_nothing_that_may_be_served_waits_for_no_turn(pod: Pod) -> None:
    world = promoting(4, limit=1)
    world.pods["new"] = pod
    world.decide()
    assert world.directed(2) == {"pod-00", "new"}


def test_a_pin_to_no_draft_is_paced_too() -> None:
    world = World(4, max_pods_swapping=1)
    world.desired(pinned=0, pin_reason="cost")
    assert world.directed(0) == {"pod-00"}


def test_no_pod_begins_to_move_before_the_fleet_has_reported() -> None:
    world = promoting(4, limit=1)
    world.restart()
    world.decide()
    assert world.directed(2) == set()
    world.is_settled = True
    world.decide()
    assert world.directed(2) == {"pod-00"}


def test_a_switchback_takes_no_turns() -> None:
    world = World(2, max_pods_swapping=1)
    world.publish()
    world.obey()
    for held in (2, 1, 2):
        (pod,) = world.directed(2)
        there = next(v for v in world.speculator.versions if v.number == held)
        world.pods[pod] = replace(world.pods[pod], loaded=held, tensors_digest=there.tensors_digest)
        world.decide()
        assert world.directed(2) == {pod}
        assert world.decision.directives[pod].switchback is not None
