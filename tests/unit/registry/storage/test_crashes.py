"""A candidate that kills the pods that load it: it is to blame, it is fed with no others, and it is soon over."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.support.rollouts import World

from updraft_registry.rollout.comparison import Evidence
from updraft_rollouts.policy import Analysis, RolloutPolicy, RolloutStep
from updraft_rollouts.terms import Comparison, Phase

SILENCE_S = 45
"""Until the registry forgets a pod."""


def crashes(world: World) -> tuple[int, int]:
    """Failures of the candidate and of the stable version."""
    return world.rollout.evidence.failures, world.rollout.evidence.baseline_failures


def test_a_pod_that_dies_while_it_loads_the_candidate_is_a_failure_of_the_candidate() -> None:
    world = World(16)
    pod = min(world.directed(world.publish()))
    world.die(pod)
    world.decide(after_s=1)
    world.start(pod, "2")
    world.decide(after_s=10)
    assert crashes(world) == (1, 0)


def test_a_pod_outside_the_canary_that_dies_is_a_failure_of_the_stable_version() -> None:
    world = World(16)
    candidate = world.publish()
    pod = min(world.directed(1))
    world.die(pod)
    world.decide(after_s=1)
    world.start(pod, "2")
    world.decide(after_s=10)
    assert crashes(world) == (0, 1)
    assert pod not in world.directed(candidate)


def test_a_pod_that_waited_for_its_turn_to_swap_was_not_told_the_candidate() -> None:
    world = World(16, steps=(RolloutStep(pods_percent=50, hold_seconds=60),), max_pods_swapping=1)
    candidate = world.publish()
    world.decide()
    (told,) = world.directed(candidate)
    for pod in (told, next(name for name in world.rollout.pods if name != told)):
        world.start(pod, "2")
    world.decide()
    assert crashes(world) == (1, 1)


def test_a_pod_that_is_gone_keeps_its_place_for_ten_minutes_for_it_may_have_crashed() -> None:
    world = World(16, steps=(RolloutStep(pods_percent=10, hold_seconds=700),))
    candidate = world.canary()
    gone, other = sorted(world.directed(candidate))
    pod = world.pods.pop(gone)
    world.decide()
    assert world.directed(candidate) == {other}
    assert world.message.endswith("the last step holds for another 12 min"), "it is not waited for"
    world.run(590, step_s=10)
    assert world.directed(candidate) == {other}
    world.run(20, step_s=10)
    assert len(world.directed(candidate)) == 2
    world.pods[gone] = pod
    world.decide()
    assert len(world.directed(candidate)) == 2
    assert gone not in world.directed(candidate)


def test_while_all_its_pods_are_away_a_canary_waits_for_them_to_come_back() -> None:
    world = World(16)
    candidate = world.publish()
    pods = world.directed(candidate)
    for name in pods:
        del world.pods[name]
    world.run(100)
    assert world.directed(candidate) == set()
    assert set(world.rollout.pods) == pods
    assert "waiting for 2 of 2 pods to come back" in world.message


def test_a_canary_that_shrinks_keeps_the_pods_that_are_here() -> None:
    world = World(16, steps=(RolloutStep(pods_percent=50, hold_seconds=60),))
    candidate = world.canary()
    gone = world.rollout.pods[0]
    del world.pods[gone]
    world.policy(steps=(RolloutStep(pods_percent=10, hold_seconds=60),))
    assert len(world.directed(candidate)) == 2


def test_a_fleet_whose_canary_pods_crashed_does_not_begin_again_on_those_that_are_left() -> None:
    world = World(3, steps=(RolloutStep(pods_percent=100, hold_seconds=60),))
    candidate = world.publish()
    (left,) = world.directed(1)
    world.pods = {left: world.pods[left]}
    world.run(60)
    assert world.rollout.comparison is Comparison.PODS
    assert world.directed(candidate) == set()


def test_no_pod_without_a_stream_is_chosen() -> None:
    world = World(16)
    likely = World(16)
    candidate = likely.publish()
    for name in likely.directed(candidate):
        world.die(name)
    world.publish()
    assert len(world.directed(candidate)) == 2
    assert not world.directed(candidate) & likely.directed(candidate)


def test_a_pod_that_crashed_sits_out_while_there_are_others() -> None:
    world = World(16)
    candidate = world.canary()
    first, second = sorted(world.directed(candidate))
    world.start(first, "2")
    world.decide()
    assert world.directed(candidate) == {second}
    assert set(world.rollout.pods) == {first, second}, "its place is not given to another one"
    world.run(30)
    assert crashes(world) == (1, 0)


def test_once_all_have_crashed_one_tries_again_and_the_others_wait_for_what_becomes_of_it() -> None:
    world = World(16, analysis=Analysis(failure_limit=9))
    candidate = world.canary()
    for pod in (first := world.rollout.pods[0], second := world.rollout.pods[1]):
        world.start(pod, "2")
    world.decide()
    assert world.directed(candidate) == {first}
    world.die(first)
    world.decide(after_s=1)
    del world.pods[first]
    world.run(60)
    assert (world.directed(candidate), crashes(world)) == (set(), (2, 0))
    world.start(first, "3")
    world.decide()
    assert (world.directed(candidate), crashes(world)) == ({first}, (3, 0))
    assert world.directed(1) >= {second}


def test_who_sits_out_does_so_after_a_restart_of_the_registry_too() -> None:
    world = World(16)
    candidate = world.canary()
    first, second = sorted(world.directed(candidate))
    world.start(first, "2")
    world.decide()
    world.restart()
    world.decide()
    assert world.directed(candidate) == {second}
    world.is_settled = True
    world.decide()
    assert world.directed(candidate) == {second}


def test_evidence_of_an_older_registry_names_no_pods_that_crashed() -> None:
    text = Evidence.begin(0).to_json().replace(', "crashes": {}', "")
    assert "crashes" not in text
    assert Evidence.from_json(text).crashes == {}


class CrashLoop:
    """A fleet in which whoever loads the candidate dies of it, and is started again later and later, as by Kubernetes."""

    def __init__(self, world: World, *, lives_s: int, start_s: int) -> None:
        self.world = world
        self.candidate = world.publish()
        self.touched = world.directed(self.candidate)
        self.num_crashes = 0
        self._lives_s = lives_s
        self._start_s = start_s
        self._second = 0
        self._dies_s: dict[str, int] = {}
        self._silent_s: dict[str, int] = {}
        self._back_s: dict[str, int] = {}
        self._lives: dict[str, int] = {}

    def run(self, seconds: int) -> None:
        """Until the candidate is decided on, or time is up."""
        for self._second in range(seconds):
            self._fleet()
            self.world.decide(after_s=1)
            if self.world.phases[self.candidate] is not Phase.CANARY:
                return
            self.touched |= self.world.directed(self.candidate)

    def _fleet(self) -> None:
        for name in self.world.directed(self.candidate) - self._silent_s.keys() - self._dies_s.keys():
            self._dies_s[name] = self._second + self._lives_s
            self.world.obey([name] if self._lives_s else [])
        self._each(self._dies_s, self._die)
        self._each(self._silent_s, lambda name: self.world.pods.pop(name, None))
        self._each(self._back_s, self._start)

    def _each(self, at_s: dict[str, int], act: Callable[[str], object]) -> None:
        for name in [name for name, second in at_s.items() if second <= self._second]:
            act(name)
            if at_s is not self._silent_s:
                del at_s[name]

    def _die(self, name: str) -> None:
        self.num_crashes += 1
        life = self._lives[name] = self._lives.get(name, 0) + 1
        self.world.die(name)
        self._silent_s[name] = self._second + SILENCE_S
        self._back_s[name] = self._second + min(300, 10 * 2 ** (life - 1)) + self._start_s

    def _start(self, name: str) -> None:
        del self._silent_s[name]
        self.world.start(name, str(self._lives[name]))


@pytest.mark.parametrize("lives_s", [0, 5], ids=["while it loads", "five seconds later"])
@pytest.mark.parametrize("start_s", [0, 120], ids=["back at once", "back after it was forgotten"])
def test_a_candidate_that_kills_pods_is_rolled_back_after_few_crashes_on_the_pods_of_one_step(
    lives_s: int, start_s: int
) -> None:
    fleet = CrashLoop(World(16), lives_s=lives_s, start_s=start_s)
    fleet.run(900)
    assert fleet.world.phases == {1: Phase.STABLE, 2: Phase.ROLLED_BACK}
    assert fleet.world.speculator.versions[-1].reason.startswith("3 errors or crashes with the candidate, limit 2")
    assert fleet.num_crashes == RolloutPolicy().analysis.failure_limit + 1
    assert len(fleet.touched) == 2


def switchback(num_pods: int = 1) -> World:
    """Version 2 is compared on all pods, which hold both versions."""
    world = World(num_pods, analysis=Analysis(switchback_seconds=20, comparison=Comparison.SWITCHBACK))
    world.publish()
    world.obey()
    world.decide()
    return world


def test_a_pod_of_a_switchback_that_dies_in_a_swap_to_the_candidate_is_a_failure_of_the_candidate() -> None:
    world = switchback()
    world.run(21)
    world.die("pod-00")
    world.decide()
    world.start("pod-00", "2")
    world.decide(after_s=25)
    assert crashes(world) == (1, 0)


def test_a_pod_of_a_switchback_that_dies_in_the_turn_of_the_stable_version_is_a_failure_of_that() -> None:
    world = switchback()
    world.run(15)
    world.die("pod-00")
    world.run(15)
    world.start("pod-00", "2")
    world.decide()
    assert crashes(world) == (0, 1)


def test_a_pod_of_a_switchback_that_does_not_have_the_candidate_yet_cannot_die_of_it() -> None:
    world = World(1, analysis=Analysis(switchback_seconds=20))
    world.publish()
    for _ in range(25):
        world.decide(after_s=1)
    world.start("pod-00", "2")
    world.decide()
    assert crashes(world) == (0, 1)


def test_a_candidate_that_kills_a_single_pod_at_each_of_its_turns_is_rolled_back() -> None:
    world = switchback()
    for life in range(1, 20):
        world.run(20, step_s=2)
        world.die("pod-00")
        world.decide(after_s=1)
        world.start("pod-00", str(life))
        world.decide(after_s=19)
        world.pods["pod-00"] = replace(world.pods["pod-00"], prefetched=frozenset({1, 2}))
        world.decide()
        if world.phases[2] is not Phase.CANARY:
            break
    assert world.phases[2] is Phase.ROLLED_BACK
    assert life == 3
