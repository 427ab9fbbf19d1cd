"""A version that is tried on some pods: its steps, its pods, its verdicts, and all that comes in between."""

from dataclasses import replace
from typing import Any

import pytest
from tests.support.rollouts import STEPS, World
from tests.support.versions import NOW_MS, refusing

from updraft_registry.rollout.placement import Pod
from updraft_registry.rollout.speedup import Speedup
from updraft_registry.rollout.traffic import Traffic
from updraft_registry.rollout.version import NO_DRAFT, Actor, Rollout
from updraft_rollouts.policy import Analysis, RolloutPolicy, RolloutStep
from updraft_rollouts.terms import Comparison, OnInconclusive, Phase, Source, Strategy


def test_a_candidate_first_serves_a_tenth_of_the_pods() -> None:
    world = World(16)
    candidate = world.publish()
    assert world.phases == {1: Phase.STABLE, 2: Phase.CANARY}
    assert len(world.directed(candidate)) == 2
    assert len(world.directed(1)) == 14
    assert world.decision.transitions[0].reason.startswith("acceptance length 3.0")


def test_its_pods_hold_both_versions_ready_and_the_others_do_so_from_the_second_step_on() -> None:
    world = World(16, steps=STEPS)
    candidate = world.canary()
    (order,) = {world.decision.directives[name] for name in world.directed(candidate)}
    assert (order.serve, order.prefetch, order.phase) == (2, (1, 2), Phase.CANARY)
    (order,) = {world.decision.directives[name] for name in world.directed(1)}
    assert (order.serve, order.prefetch, order.phase) == (1, (1,), Phase.STABLE)
    world.run(61)
    (order,) = {world.decision.directives[name] for name in world.directed(1)}
    assert (order.serve, order.prefetch) == (1, (1, 2))


def test_the_pods_of_a_step_are_also_of_the_next() -> None:
    world = World(16, steps=STEPS)
    candidate = world.canary()
    first = world.directed(candidate)
    world.run(61)
    assert len(world.directed(candidate)) == 8
    assert first < world.directed(candidate)


def test_other_candidates_are_tried_on_other_pods() -> None:
    worlds = [World(16) for _ in range(8)]
    tried = set()
    for number, world in enumerate(worlds, start=2):
        for _ in range(number - 1):
            candidate = world.publish(None)  # rejected, but it takes a number
        tried |= world.directed(world.publish())
    assert candidate
    assert len(tried) > 6


def test_a_step_holds_from_when_all_its_pods_serve_the_candidate() -> None:
    world = World(16, steps=STEPS)
    candidate = world.publish()
    world.decide(after_s=50)
    assert "waiting for 2 of 2 pods to load it" in world.message
    first, second = sorted(world.directed(candidate))
    world.obey([first])
    world.decide(after_s=50)
    assert "waiting for 1 of 2 pods to load it" in world.message
    world.obey([second])
    world.decide()
    assert world.message.endswith("step 2 in 60 s")
    world.decide(after_s=59)
    assert world.rollout.step == 0
    world.decide(after_s=1)
    assert world.rollout.step == 1


def test_a_better_candidate_serves_everyone_after_the_last_step_and_not_before() -> None:
    world = World(16, steps=STEPS)
    candidate = world.canary(gain_percent=10)
    world.run(119)
    assert world.phases[candidate] is Phase.CANARY
    world.run(3)
    assert world.phases == {1: Phase.SUPERSEDED, 2: Phase.STABLE}
    assert world.directed(candidate) == set(world.pods)
    assert world.speculator.rollout is None


@pytest.mark.parametrize("num_pods", [1, 16])
def test_every_pod_receives_that_versions_are_compared_from_the_first_step_to_the_verdict(num_pods: int) -> None:
    world = World(num_pods, steps=STEPS)
    assert not any(order.is_comparing for order in world.decide().directives.values())
    candidate = world.canary(gain_percent=10)
    assert world.phases[candidate] is Phase.CANARY
    assert all(order.is_comparing for order in world.decide().directives.values())
    world.run(600)
    assert world.phases[candidate] is Phase.STABLE
    assert not any(order.is_comparing for order in world.decide().directives.values())


def test_its_promotion_has_the_evidence_as_its_reason() -> None:
    world = World(16, steps=(RolloutStep(pods_percent=10, hold_seconds=0),))
    world.canary(gain_percent=10)
    stepped_down, promoted = world.decide().transitions
    assert promoted.reason.startswith("acceptance is significantly higher: 1.10 against 1.00 tokens per step, +10.0 %")
    assert (promoted.actor, promoted.before) == (Actor.GATE, Phase.CANARY)
    assert stepped_down.reason.startswith("version 2 took over: acceptance is significantly higher")


@pytest.mark.parametrize("is_paused", [False, True])
@pytest.mark.parametrize(
    "evidence",
    [
        pytest.param({"gain_percent": -10}, id="accepted less"),
        pytest.param({"gain_percent": 10, "latency_percent": 20}, id="slower"),
        pytest.param({"gain_percent": 10, "failures": 3}, id="errors"),
    ],
)
def test_a_candidate_that_fails_is_rolled_back_at_once(evidence: dict[str, Any], *, is_paused: bool) -> None:
    world = World(16)
    candidate = world.canary(**evidence)
    decision = world.desired(is_paused=is_paused)
    assert world.phases == {1: Phase.STABLE, 2: Phase.ROLLED_BACK}
    assert world.directed(candidate) == set()
    assert (decision.transitions[0].actor, decision.message) == (
        Actor.GATE,
        "version 1 is stable; waiting for 2 of 16 pods to load it" + "; the rollout is paused" * is_paused,
    )


def test_its_pods_leave_it_at_once_however_few_may_swap() -> None:
    world = World(16, max_pods_swapping=1, steps=(RolloutStep(pods_percent=50, hold_seconds=0),))
    candidate = world.publish()
    world.run(20)
    assert len(world.directed(candidate)) == 8
    world.see(gain_percent=-10)
    world.decide()
    assert world.directed(1) == set(world.pods)


def test_without_automatic_rollback_a_person_decides() -> None:
    world = World(16, auto_rollback=False)
    candidate = world.canary(gain_percent=-10)
    world.run(1000, step_s=10)
    assert world.phases[candidate] is Phase.CANARY
    assert world.rollout.step == 0
    assert world.message.endswith("it failed, and auto rollback is off: promote or reject it")


def test_a_dry_run_only_tells_and_ends_in_a_promotion() -> None:
    world = World(16, steps=STEPS, analysis=Analysis(dry_run=True))
    candidate = world.canary(gain_percent=-10)
    world.run(110)
    assert "acceptance is significantly lower" in world.message
    world.run(20)
    assert world.phases[candidate] is Phase.STABLE


@pytest.mark.parametrize(
    ("on_inconclusive", "phase", "reason"),
    [
        (OnInconclusive.ROLLBACK, Phase.ROLLED_BACK, "no verdict within 15 min"),
        (OnInconclusive.PROMOTE, Phase.STABLE, "promoted without a verdict after 15 min"),
        (OnInconclusive.PAUSE, Phase.CANARY, "acceptance length 3.0"),
    ],
)
def test_a_candidate_without_a_verdict_waits_for_the_deadline(
    on_inconclusive: OnInconclusive, phase: Phase, reason: str
) -> None:
    world = World(16, analysis=Analysis(on_inconclusive=on_inconclusive))
    candidate = world.canary(gain_percent=0)
    world.run(890, step_s=10)
    assert world.message.endswith("waiting for evidence, 10 s until the deadline")
    world.run(20)
    assert world.phases[candidate] is phase
    assert world.speculator.versions[-1].reason.startswith(reason)
    if phase is Phase.CANARY:
        assert world.message.endswith("no verdict within 15 min: promote or reject it")


def test_a_verdict_that_comes_before_the_deadline_counts() -> None:
    world = World(16)
    candidate = world.canary(gain_percent=0)
    world.run(500, step_s=10)
    world.see(gain_percent=10)
    world.decide()
    assert world.phases[candidate] is Phase.STABLE


@pytest.mark.parametrize("on_inconclusive", list(OnInconclusive))
def test_what_its_pods_could_not_load_is_rolled_back_whatever_the_policy_says_of_no_verdict(
    on_inconclusive: OnInconclusive,
) -> None:
    world = World(16, analysis=Analysis(on_inconclusive=on_inconclusive))
    candidate = world.publish()
    for _ in range(91):
        world.decide(after_s=10)
    assert world.phases[candidate] is Phase.ROLLED_BACK
    assert world.speculator.versions[-1].reason == "after 15 min it was still waiting for 2 of 2 pods to load it"


def test_what_won_is_promoted_at_the_deadline_although_one_pod_could_not_load_it() -> None:
    world = World(16, steps=(RolloutStep(pods_percent=50, hold_seconds=0),))
    candidate = world.publish()
    world.obey(sorted(world.directed(candidate))[1:])
    world.see(gain_percent=10)
    for _ in range(91):
        world.decide(after_s=10)
    assert world.phases[candidate] is Phase.STABLE
    assert world.speculator.versions[-1].reason.startswith("acceptance is significantly higher")


def test_a_pod_with_troubles_of_its_own_is_not_waited_for() -> None:
    world = World(16, steps=(RolloutStep(pods_percent=50, hold_seconds=30),))
    first, *others = sorted(world.directed(world.publish()))
    world.obey(others)
    world.pods[first] = replace(world.pods[first], trouble="not yet: no space left on device")
    world.decide()
    assert world.message.endswith("the last step holds for another 30 s")


def test_a_pause_freezes_step_clock_and_pods() -> None:
    world = World(16, steps=STEPS)
    candidate = world.canary(gain_percent=10)
    world.run(30)
    before = world.directed(candidate)
    world.desired(is_paused=True, pause_reason="release day")
    world.run(1000, step_s=10)
    assert world.directed(candidate) == before
    assert world.message.endswith("; the rollout is paused: release day")
    assert world.rollout.paused_ms == 1_000_000
    world.desired(is_paused=False)
    world.run(29)
    assert world.rollout.step == 0
    world.run(2)
    assert world.rollout.step == 1


def test_a_pause_takes_no_pod_that_comes_and_no_other_strategy() -> None:
    world = World(5)
    candidate = world.canary()
    world.desired(is_paused=True)
    world.pods |= World(20).pods
    world.policy(strategy=Strategy.IMMEDIATE)
    assert len(world.directed(candidate)) == 1
    assert world.phases[candidate] is Phase.CANARY
    world.desired(is_paused=False)
    assert world.phases[candidate] is Phase.STABLE


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_clock_that_jumps_costs_a_minute_at_most(jump_s: float) -> None:
    world = World(16, analysis=Analysis(on_inconclusive=OnInconclusive.ROLLBACK))
    candidate = world.canary(gain_percent=0)
    world.run(100)
    world.decide(after_s=jump_s)
    assert world.rollout.run_ms == 100_000 + (60_000 if jump_s > 0 else 0)
    world.run(700, step_s=10)
    assert world.phases[candidate] is Phase.CANARY


def test_a_pin_ends_a_canary_and_unpinning_begins_it_anew() -> None:
    world = World(16)
    candidate = world.canary(gain_percent=10)
    world.desired(pinned=1, pin_reason="quiet please")
    assert world.phases == {1: Phase.STABLE, 2: Phase.HELD}
    assert world.directed(1) == set(world.pods)
    assert world.speculator.versions[-1].reason == "version 1 is pinned: quiet please"
    world.desired(pinned=None)
    assert world.phases[candidate] is Phase.CANARY
    assert world.rollout.evidence.slices == 0


def test_pinning_the_candidate_makes_it_stable() -> None:
    world = World(16)
    candidate = world.canary()
    world.desired(pinned=candidate)
    assert world.phases == {1: Phase.SUPERSEDED, 2: Phase.STABLE}
    assert world.directed(candidate) == set(world.pods)


def test_newer_versions_wait_for_the_canary_and_only_the_newest_is_tried_then() -> None:
    world = World(16)
    world.canary()
    world.publish()
    assert world.speculator.versions[-1].reason == "version 2 is in canary"
    world.publish()
    assert world.phases == {1: Phase.STABLE, 2: Phase.CANARY, 3: Phase.SUPERSEDED, 4: Phase.HELD}
    world.see(gain_percent=-10)
    world.decide()
    assert world.phases == {1: Phase.STABLE, 2: Phase.ROLLED_BACK, 3: Phase.SUPERSEDED, 4: Phase.CANARY}


def test_a_candidate_begins_again_when_the_stable_version_fails() -> None:
    world = World(16)
    second = world.canary(gain_percent=10)
    world.policy(steps=(RolloutStep(pods_percent=10, hold_seconds=0),))
    world.obey()
    third = world.canary(gain_percent=10)
    assert (world.stable, world.rollout.baseline) == (second, second)
    pods = world.directed(third)
    world.see(gain_percent=5)
    for name in set(world.pods) - pods:
        world.pods[name] = refusing(name, second)
    decision = world.decide()
    assert world.phases == {1: Phase.STABLE, 2: Phase.FAILED, 3: Phase.CANARY}
    assert (world.rollout.baseline, world.rollout.evidence.slices) == (1, 0)
    assert world.directed(third) == pods, "the same pods try it"
    assert decision.transitions[0].actor is Actor.FLEET


def test_a_candidate_goes_on_against_no_draft_when_the_stable_version_fails_and_no_other_has_won() -> None:
    world = World(16)
    candidate = world.canary(gain_percent=5)
    pods = world.directed(candidate)
    for name in world.directed(1):
        world.pods[name] = refusing(name, 1)
    world.decide()
    assert world.phases == {1: Phase.FAILED, 2: Phase.CANARY}
    assert (world.rollout.baseline, world.rollout.evidence.slices) == (NO_DRAFT, 0)
    assert world.directed(candidate) == pods
    assert world.directed(NO_DRAFT) == set(world.pods) - pods


def test_a_canary_pod_that_refuses_fails_the_candidate_and_no_other_pod_has_seen_it() -> None:
    world = World(5)
    candidate = world.publish()
    (pod,) = world.directed(candidate)
    world.pods[pod] = refusing(pod, candidate)
    world.decide()
    assert world.phases == {1: Phase.STABLE, 2: Phase.FAILED}
    assert world.directed(1) == set(world.pods)


def test_a_candidate_that_one_pod_of_a_switchback_refuses_goes_on_whosever_turn_it_is() -> None:
    analysis = Analysis(comparison=Comparison.SWITCHBACK)
    world = World(8, steps=(RolloutStep(pods_percent=50, hold_seconds=30),), analysis=analysis)
    candidate = world.canary()
    for refused, pod in enumerate(sorted(world.directed(candidate)), start=1):
        world.pods[pod] = replace(world.pods[pod], refused=candidate)
        world.decide()
        assert world.phases[candidate] is (Phase.FAILED if refused > 2 else Phase.CANARY)
        if refused > 2:
            break


def test_one_broken_pod_among_many_is_not_waited_for() -> None:
    world = World(40, steps=(RolloutStep(pods_percent=10, hold_seconds=30),))
    candidate = world.canary()
    broken = min(world.directed(candidate))
    world.pods[broken] = refusing(broken, candidate)
    world.decide()
    assert world.phases[candidate] is Phase.CANARY
    assert world.message.endswith("the last step holds for another 30 s")


def test_a_pod_that_drained_and_went_is_replaced_and_does_not_come_on_top_when_it_returns() -> None:
    world = World(16)
    candidate = world.canary()
    gone = min(world.directed(candidate))
    pod = world.pods[gone]
    world.leave(gone)
    world.decide()
    assert len(world.directed(candidate)) == 2
    world.pods[gone] = pod
    world.decide()
    assert len(world.directed(candidate)) == 2


def test_a_restart_moves_no_pod_that_was_in_the_canary_once() -> None:
    world = World(16)
    candidate = world.canary()
    gone = min(world.directed(candidate))
    pod = world.pods[gone]
    world.leave(gone)
    world.decide()
    world.pods[gone] = pod
    world.decide()
    before = world.directed(candidate)
    world.restart()
    world.decide()
    assert world.directed(candidate) == before == set(world.rollout.pods)
    assert gone not in before


def test_a_draining_pod_is_not_counted_chosen_or_waited_for() -> None:
    world = World(8, steps=(RolloutStep(pods_percent=50, hold_seconds=30),))
    world.pods = {name: replace(pod, is_draining=name < "pod-04") for name, pod in world.pods.items()}
    candidate = world.publish()
    first, second = sorted(world.directed(candidate))
    assert first >= "pod-04"
    world.pods[first] = replace(world.pods[first], is_draining=True)
    world.obey([second])
    world.decide()
    assert world.directed(candidate) == {first, second}, "it goes away by itself"
    assert world.message.endswith("the last step holds for another 30 s")


def test_without_pods_a_candidate_waits_to_be_tried() -> None:
    world = World(0)
    candidate = world.publish()
    assert world.speculator.versions[-1].reason.endswith("; waiting for pods")
    world.pods = World(3).pods
    world.decide()
    assert world.phases[candidate] is Phase.CANARY


def test_time_without_pods_does_not_count() -> None:
    world = World(16)
    world.canary()
    world.pods, pods = {}, world.pods
    for _ in range(100):
        world.decide(after_s=10)
    assert world.message.endswith("no pod is connected")
    world.pods = pods
    world.decide()
    assert world.rollout.run_ms == 0


@pytest.mark.parametrize(("strategy", "phase"), [(Strategy.IMMEDIATE, Phase.STABLE), (Strategy.MANUAL, Phase.HELD)])
def test_another_strategy_ends_a_canary(strategy: Strategy, phase: Phase) -> None:
    world = World(16)
    candidate = world.canary()
    world.policy(strategy=strategy)
    assert world.phases[candidate] is phase
    assert world.speculator.rollout is None


def test_a_single_pod_alternates_both_versions() -> None:
    world = World(1, analysis=Analysis(switchback_seconds=15))
    world.publish()
    order = world.decision.directives["pod-00"]
    assert (order.serve, order.phase, order.prefetch) == (1, Phase.STABLE, (1, 2))
    assert order.switchback is not None
    assert (order.switchback.versions, order.switchback.slice_s) == ((1, 2), 15)
    assert order.switchback.start_ms == world.rollout.started_ms == NOW_MS
    assert "in canary by switchback on 1 of 1 pods" in world.message


def test_a_switchback_is_in_place_once_the_pod_has_both() -> None:
    world = World(1, steps=(RolloutStep(pods_percent=10, hold_seconds=30),))
    world.publish()
    assert "waiting for 1 of 1 pods to load it" in world.message
    world.obey()
    world.decide()
    assert world.message.endswith("the last step holds for another 30 s")


def test_slices_of_a_switchback_are_whole_cycles_of_its_own_pods() -> None:
    analysis = Analysis(interval_seconds=30, switchback_seconds=20, comparison=Comparison.SWITCHBACK)
    world = World(4, steps=(RolloutStep(pods_percent=25, hold_seconds=600),), analysis=analysis)
    (pod,) = world.directed(world.publish())
    world.obey()
    for second in range(90):
        served = Traffic(requests=second, verify_steps=second, tokens=second)
        world.pods = {name: replace(p, traffic={1: served, 2: served}) for name, p in world.pods.items()}
        world.decide(after_s=1)
        if second == 38:
            assert world.rollout.evidence.slices == 0, "30 s are over, the second turn is not"
    assert world.rollout.evidence.slices == 2
    assert set(world.rollout.evidence.last_reports) == {pod}


def test_a_slice_of_a_switchback_that_lacks_requests_ends_with_a_later_cycle() -> None:
    world = World(1, analysis=Analysis(interval_seconds=30, switchback_seconds=20))
    world.publish()
    world.obey()
    for second in range(1, 82):
        served = Traffic(requests=second // 6, verify_steps=second, tokens=second)
        world.pods = {name: replace(p, traffic={1: served, 2: served}) for name, p in world.pods.items()}
        world.decide(after_s=1)
        assert world.rollout.evidence.slices == (1 if second >= 80 else 0), "8 requests were there after 48 s"


@pytest.mark.parametrize(("num_pods", "comparison"), [(2, Comparison.SWITCHBACK), (3, Comparison.PODS)])
def test_pods_are_compared_with_pods_from_three_on(num_pods: int, comparison: Comparison) -> None:
    world = World(num_pods)
    world.publish()
    assert world.rollout.comparison is comparison


def test_a_fleet_that_shrinks_to_one_pod_begins_again_as_a_switchback() -> None:
    world = World(3)
    candidate = world.canary(gain_percent=1)
    world.pods = {name: pod for name, pod in world.pods.items() if name in world.directed(candidate)}
    world.decide()
    assert world.rollout.comparison is Comparison.SWITCHBACK
    assert world.rollout.evidence.slices == 0


def test_one_pod_at_least_serves_the_stable_version_to_compare_with() -> None:
    world = World(4, steps=(RolloutStep(pods_percent=100, hold_seconds=0),))
    candidate = world.publish()
    assert len(world.directed(candidate)) == 3


def test_a_second_pod_that_never_comes_ends_at_the_deadline() -> None:
    world = World(1, analysis=Analysis(comparison=Comparison.PODS))
    candidate = world.publish()
    assert world.directed(candidate) == set()
    assert "waiting for a second pod to compare with" in world.message
    world.run(901, step_s=10)
    assert world.phases[candidate] is Phase.ROLLED_BACK


def test_a_policy_with_fewer_steps_goes_on_with_its_last() -> None:
    world = World(16, steps=STEPS)
    world.canary()
    world.run(61)
    world.policy(steps=(RolloutStep(pods_percent=20, hold_seconds=300),))
    assert "(step 1 of 1)" in world.message
    assert world.message.endswith("the last step holds for another 5 min")


def test_a_restarted_registry_goes_on_where_it_was_and_moves_no_pod() -> None:
    world = World(16, steps=STEPS)
    candidate = world.canary(gain_percent=5)
    world.run(90)
    orders, pods, before = world.decision.directives, world.pods, world.rollout
    world.restart()
    world.pods = {}
    for name in sorted(pods, reverse=True):  # they come back one by one
        world.pods[name] = pods[name]
        world.decide(after_s=1)
        assert world.decision.directives == {known: orders[known] for known in world.pods}
        assert world.message.endswith("waiting for pods to reconnect after a registry restart")
    world.is_settled = True
    world.decide()
    assert world.decision.directives == orders
    assert (world.rollout.step, world.rollout.pods) == (before.step, before.pods)
    assert world.rollout.evidence.slices == before.evidence.slices
    assert world.phases[candidate] is Phase.CANARY


def test_a_canary_does_not_begin_before_the_fleet_has_reported() -> None:
    world = World(16)
    world.is_settled = False
    candidate = world.publish()
    assert world.phases[candidate] is Phase.HELD
    world.is_settled = True
    world.decide()
    assert world.phases[candidate] is Phase.CANARY


def test_a_version_in_canary_whose_progress_is_lost_begins_again() -> None:
    world = World(16)
    candidate = world.canary(gain_percent=10)
    pods = world.directed(candidate)
    world.speculator = replace(world.speculator, rollout=None)
    world.decide()
    assert world.rollout.evidence.slices == 0
    assert world.directed(candidate) == pods


def test_what_is_written_is_read_back_and_then_written_the_same() -> None:
    world = World(16, steps=STEPS)
    world.canary(gain_percent=3, failures=1)
    world.run(75)
    text = world.rollout.to_json()
    again = Rollout.from_json(text)
    assert again.to_json() == text
    assert (again.pods, again.step, again.evidence.failures) == (world.rollout.pods, 1, 1)


def test_a_canary_is_not_written_every_second() -> None:
    world = World(16, steps=(RolloutStep(pods_percent=10, hold_seconds=600),))
    world.canary()
    texts = []
    for _ in range(100):
        world.decide(after_s=1)
        texts.append(world.rollout.to_json())
    assert len(set(texts)) < 13


def test_the_sentence_says_where_it_stands_and_what_it_waits_for() -> None:
    world = World(
        16, steps=(RolloutStep(pods_percent=10, hold_seconds=0), RolloutStep(pods_percent=50, hold_seconds=0))
    )
    world.canary(gain_percent=0.1)
    world.run(420, step_s=10)
    assert world.message == (
        "version 2 is in canary on 8 of 16 pods (step 2 of 2): acceptance is not significantly higher yet: "
        "1.00 against 1.00 tokens per step, +0.1 % (-0.9 to +1.1 % at 95 %); "
        "1e+03 against 1e+03 ms per token, +0.0 % (-1.0 to +1.0 % at 95 %); 600 requests in 12 slices; "
        "waiting for evidence, 8 min until the deadline"
    )


def first_version(num_pods: int = 16, **policy: Any) -> World:
    """A first version in canary on its pods, which hold it."""
    world = World(num_pods, **policy)
    world.speculator = replace(world.speculator, versions=(), latest=0)
    world.pods = {name: Pod(name=name, boot="1") for name in world.pods}
    world.decide()
    world.canary()
    return world


def measured(world: World, ratio: float) -> None:
    """The pods that hold the first version measure its speedup, to 5 %."""
    speedup = Speedup(ratio=ratio, low=ratio - 0.05, high=ratio + 0.05)
    world.pods = {name: replace(pod, speedup=speedup if pod.loaded else None) for name, pod in world.pods.items()}


@pytest.mark.parametrize(("num_pods", "tried"), [(1, 1), (2, 1), (16, 2)])
def test_a_first_version_serves_its_canary_at_once_also_the_only_pod(num_pods: int, tried: int) -> None:
    world = first_version(num_pods)
    assert world.phases == {1: Phase.CANARY}
    assert len(world.directed(1)) == tried
    assert len(world.directed(NO_DRAFT)) == num_pods - tried
    assert all(order.is_comparing for order in world.decide().directives.values())


def test_a_first_version_with_which_decoding_is_surely_faster_serves_all() -> None:
    world = first_version(steps=STEPS)
    world.see(gain_percent=40)
    measured(world, 1.2)
    world.run(119)
    assert world.phases == {1: Phase.CANARY}
    world.run(3)
    assert world.phases == {1: Phase.STABLE}
    assert world.speculator.versions[0].reason == (
        "decoding is significantly faster than without a draft: speedup 1.20 (1.15 to 1.25 at 90 %); "
        "1.40 against 1.00 tokens per step, +40.0 % (+38.6 to +41.4 % at 95 %); 600 requests in 12 slices"
    )


def test_a_first_version_that_does_not_pay_is_rolled_back_to_no_draft() -> None:
    world = first_version()
    world.see(gain_percent=40)
    measured(world, 0.9)
    world.decide()
    assert world.phases == {1: Phase.ROLLED_BACK}
    assert world.speculator.versions[0].reason.startswith("decoding is significantly slower than without a draft: ")
    assert world.directed(NO_DRAFT) == set(world.pods)
    assert world.message == "no version serves; waiting for the first that passes the gate"


def test_where_no_speedup_is_measured_acceptance_decides_on_a_first_version() -> None:
    world = first_version(steps=STEPS)
    world.see(gain_percent=40)
    world.run(122)
    assert world.speculator.versions[0].reason.startswith("draft tokens are accepted: 1.40 against 1.00")


def test_a_first_version_without_traffic_serves_on_until_there_is_some() -> None:
    world = first_version(1)
    world.run(7200, step_s=60)
    assert world.phases == {1: Phase.CANARY}
    assert world.directed(1) == set(world.pods)
    assert world.message.endswith(
        "waiting for traffic: 0 requests in 0 slices; waiting for evidence, 15 min of traffic until the deadline"
    )
    world.see(gain_percent=40)
    world.decide()
    assert world.phases == {1: Phase.STABLE}


def test_a_first_version_that_traffic_tells_nothing_of_is_rolled_back_after_as_many_slices_as_the_deadline_has() -> (
    None
):
    world = first_version(1)
    world.run(7200, step_s=60)
    world.see(gain_percent=0, slices=29)
    world.decide()
    assert world.phases == {1: Phase.CANARY}
    world.see(gain_percent=0, slices=30)
    world.decide()
    assert world.phases == {1: Phase.ROLLED_BACK}
    assert world.speculator.versions[0].reason.startswith("no verdict within 15 min: no draft token is surely accepted")


def test_a_first_version_without_traffic_is_promoted_at_the_deadline_if_the_policy_says_so() -> None:
    world = first_version(1, analysis=Analysis(on_inconclusive=OnInconclusive.PROMOTE))
    world.run(890, step_s=10)
    assert world.phases == {1: Phase.CANARY}
    world.run(20)
    assert world.phases == {1: Phase.STABLE}
    assert "15 min: waiting for traffic: 0 requests in 0 slices" in world.speculator.versions[0].reason


@pytest.mark.parametrize("on_inconclusive", [OnInconclusive.ROLLBACK, OnInconclusive.PAUSE])
def test_a_first_version_whose_only_pod_is_replaced_after_hours_waits_for_the_new_one(
    on_inconclusive: OnInconclusive,
) -> None:
    world = first_version(1, analysis=Analysis(on_inconclusive=on_inconclusive))
    world.run(7200, step_s=60)
    world.leave("pod-00")
    world.pods = {"new": Pod(name="new", boot="1")}
    world.decide(after_s=20)
    assert world.phases == {1: Phase.CANARY}
    assert "waiting for 1 of 1 pods to load it" in world.message


ANOTHER_SHAPE = "not yet: version 1 has another shape than the draft that the SGLang server started with"


def stuck(world: World, number: int) -> None:
    """The canary's pods cannot load the candidate before they restart."""
    for name in world.directed(number):
        world.pods[name] = replace(world.pods[name], trouble=ANOTHER_SHAPE)


@pytest.mark.parametrize("is_first", [True, False])
def test_an_import_whose_pods_must_restart_first_waits_for_that(*, is_first: bool) -> None:
    world = World(16)
    if is_first:
        world.speculator = replace(world.speculator, versions=(), latest=0)
        world.pods = {name: Pod(name=name, boot="1") for name in world.pods}
        world.decide()
    imported = world.publish(source=Source.IMPORTED)
    stuck(world, imported)
    for _ in range(100):
        world.decide(after_s=60)
    assert world.phases[imported] is Phase.CANARY
    assert world.message.endswith(f"waiting for a pod that can load it: {ANOTHER_SHAPE}")
    world.pods = {name: replace(pod, trouble="") for name, pod in world.pods.items()}
    world.decide(after_s=60)
    assert world.phases[imported] is Phase.CANARY, "it still has all its time"
    world.obey()
    world.see(gain_percent=40)
    world.run(300)
    assert world.phases[imported] is Phase.STABLE


def test_a_trainers_version_that_no_pod_can_load_gives_way_to_the_next_one() -> None:
    world = World(16)
    candidate = world.publish()
    stuck(world, candidate)
    for _ in range(16):
        world.decide(after_s=60)
    assert world.phases[candidate] is Phase.ROLLED_BACK


def crash(world: World, pod: str) -> None:
    """Its process ends and begins again, and loads what it is told."""
    world.start(pod, world.pods[pod].boot + "'")
    world.decide(after_s=1)
    world.obey()
    world.decide()


def test_a_candidate_with_which_pods_keep_crashing_is_rolled_back_although_only_one_crashes_many_times() -> None:
    """A pod that crashed gets it again once all have crashed, and then one alone tries it: its crashes count in full."""
    world = World(16, steps=STEPS, analysis=Analysis(failure_limit=5))
    candidate = world.canary(gain_percent=10)
    first, second = sorted(world.directed(candidate))
    world.decide()
    crash(world, first)
    crash(world, second)
    (again,) = world.directed(candidate)
    for _ in range(4):
        assert world.phases[candidate] is Phase.CANARY
        crash(world, again)
    assert world.phases == {1: Phase.STABLE, candidate: Phase.ROLLED_BACK}
    assert "6 errors or crashes with the candidate, limit 5" in world.speculator.versions[-1].reason


def test_a_pod_that_claims_crashes_after_the_candidate_was_taken_from_it_is_not_heard() -> None:
    world = World(16, steps=STEPS)
    candidate = world.canary(gain_percent=10)
    liar, honest = sorted(world.directed(candidate))
    world.decide()
    for boot in range(2, 12):
        world.pods[liar] = replace(world.pods[honest], name=liar, boot=str(boot))
        world.decide(after_s=1)
    assert world.rollout.evidence.crashes == {liar: 1}
    world.run(125)
    assert world.phases == {1: Phase.SUPERSEDED, candidate: Phase.STABLE}


def test_a_first_version_that_keeps_crashing_is_rolled_back() -> None:
    world = first_version(1)
    world.see(failures=3, slices=0)
    world.decide()
    assert world.phases == {1: Phase.ROLLED_BACK}


def test_a_policy_is_a_canary_unless_told_otherwise() -> None:
    assert (RolloutPolicy().strategy, RolloutPolicy().analysis.on_inconclusive) == (
        Strategy.CANARY,
        OnInconclusive.ROLLBACK,
    )
