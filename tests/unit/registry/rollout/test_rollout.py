"""Who serves what: the gate, pins, pauses, failures, and what a person does to single versions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.support.rollouts import BETTER, WORSE
from tests.support.versions import NOW_MS, evaluation, holding, refusing, version

from updraft_chassis.errors import Conflict
from updraft_registry.rollout.decision import Decision, decide, promote, reject
from updraft_registry.rollout.placement import Pod
from updraft_registry.rollout.version import Actor, DesiredState, Speculator, Transition, Version
from updraft_rollouts.policy import RolloutPolicy
from updraft_rollouts.terms import Phase, Source, Strategy

IMMEDIATE = RolloutPolicy(strategy=Strategy.IMMEDIATE)
FREE = DesiredState(policy=IMMEDIATE)


def phases(decision: Decision) -> dict[int, Phase]:
    return {version.number: version.phase for version in decision.versions}


def run(versions: Sequence[Version], desired: DesiredState = FREE, pods: Sequence[Pod] = ()) -> Decision:
    return decide(speculator(versions, desired), pods or [Pod(name="pod-0")], NOW_MS + 1)


def speculator(versions: Sequence[Version], desired: DesiredState = FREE) -> Speculator:
    return Speculator(name="default", desired=desired, versions=tuple(versions))


def free(**wishes: Any) -> DesiredState:
    return replace(FREE, **wishes)


def after(versions: Sequence[Version], transitions: Sequence[Transition]) -> tuple[Version, ...]:
    """The versions as the catalogue has them once these were recorded."""
    now = {v.number: v for v in versions}
    for t in transitions:
        assert t.after is not None
        won = t.proven_ms or now[t.number].proven_ms
        now[t.number] = replace(now[t.number], phase=t.after, reason=t.reason, proven_ms=won)
    return tuple(now.values())


def candidate(number: int, quality: float, *, against: int, source: Source = Source.TRAINER) -> Version:
    return version(number, evaluation=evaluation(quality, against=against), source=source)


@pytest.mark.parametrize("source", [Source.INITIAL, Source.IMPORTED])
def test_a_first_version_that_a_person_brings_needs_no_evaluation(source: Source) -> None:
    decision = run([version(1, source=source)])
    assert phases(decision) == {1: Phase.STABLE}
    assert decision.transitions[0].reason == "the first version needs no evaluation"
    assert decision.directives["pod-0"].serve == 1


def test_a_first_version_that_was_evaluated_has_to_pass() -> None:
    assert phases(run([candidate(1, 1.0, against=0, source=Source.IMPORTED)])) == {1: Phase.REJECTED}


def test_a_trainers_first_version_without_an_evaluation_is_rejected() -> None:
    decision = run([version(1)])
    assert phases(decision) == {1: Phase.REJECTED}
    assert decision.directives["pod-0"].serve == 0
    assert decision.message == "no version serves; waiting for the first that passes the gate"


def test_a_better_candidate_takes_over_at_once() -> None:
    decision = run([version(1, Phase.STABLE), candidate(2, BETTER, against=1)])
    assert phases(decision) == {1: Phase.SUPERSEDED, 2: Phase.STABLE}
    stepped_down, promoted = decision.transitions
    assert stepped_down.reason.startswith("version 2 took over: acceptance length 3.0")
    assert (promoted.actor, promoted.before) == (Actor.GATE, Phase.PENDING)
    order = decision.directives["pod-0"]
    assert (order.serve, order.prefetch, order.phase) == (2, (2,), Phase.STABLE)
    assert order.digest == version(2).digest


def test_a_candidate_that_does_not_beat_the_serving_version_is_rejected_with_the_numbers() -> None:
    decision = run([version(1, Phase.STABLE), candidate(2, WORSE, against=1)])
    assert phases(decision) == {1: Phase.STABLE, 2: Phase.REJECTED}
    assert "acceptance length 1.5" in decision.transitions[0].reason
    assert decision.directives["pod-0"].serve == 1


def test_a_trainers_candidate_that_was_compared_with_another_version_is_superseded_and_not_condemned() -> None:
    decision = run([version(1, Phase.SUPERSEDED), version(2, Phase.STABLE), candidate(3, BETTER, against=1)])
    assert phases(decision)[3] is Phase.SUPERSEDED
    assert decision.transitions[0].reason == "compared with version 1 but version 2 serves; the trainer evaluates again"
    assert promote(speculator(decision.versions), decision.versions[2], "", NOW_MS)


def test_what_a_person_brought_without_an_evaluation_waits_for_that_person() -> None:
    decision = run([version(1, Phase.STABLE), version(2, source=Source.IMPORTED)])
    assert phases(decision) == {1: Phase.STABLE, 2: Phase.HELD}
    assert decision.transitions[0].reason == "it has no evaluation: promote it to serve it"


def test_only_the_newest_waiting_version_is_tried() -> None:
    decision = run(
        [version(1, Phase.STABLE), candidate(2, BETTER, against=1), candidate(3, BETTER, against=1)],
    )
    assert phases(decision) == {1: Phase.SUPERSEDED, 2: Phase.SUPERSEDED, 3: Phase.STABLE}
    assert decision.transitions[0].reason == "version 3 is newer"


def test_manual_holds_what_passed_the_gate() -> None:
    manual = DesiredState(policy=RolloutPolicy(strategy=Strategy.MANUAL))
    versions = [version(1, Phase.STABLE), candidate(2, BETTER, against=1)]
    assert phases(run(versions, manual)) == {1: Phase.STABLE, 2: Phase.HELD}
    assert phases(run([versions[0], candidate(2, WORSE, against=1)], manual))[2] is Phase.REJECTED


def test_manual_holds_the_first_version_too() -> None:
    first = [version(1, source=Source.INITIAL)]
    held = run(first, DesiredState(policy=RolloutPolicy(strategy=Strategy.MANUAL)))
    assert phases(held) == {1: Phase.HELD}
    assert "version 1 is held" in held.message
    assert "promote it to serve it" in held.message


def test_a_pin_goes_back_without_analysis_and_holds_newer_versions() -> None:
    versions = [version(1, Phase.SUPERSEDED), version(2, Phase.STABLE), candidate(3, BETTER, against=2)]
    decision = run(versions, free(pinned=1, pin_reason="2 is slow"))
    assert phases(decision) == {1: Phase.STABLE, 2: Phase.SUPERSEDED, 3: Phase.HELD}
    assert {t.reason for t in decision.transitions} == {
        "version 1 is pinned: 2 is slow",
        "version 1 took over: version 1 is pinned: 2 is slow",
    }
    assert {t.actor for t in decision.transitions} == {Actor.OPERATOR}
    assert decision.directives["pod-0"].serve == 1


def test_a_pin_goes_forward_to_a_version_that_was_never_judged() -> None:
    decision = run([version(1, Phase.STABLE), candidate(2, WORSE, against=1)], free(pinned=2))
    assert phases(decision) == {1: Phase.SUPERSEDED, 2: Phase.STABLE}


def test_a_pin_to_zero_serves_without_a_draft() -> None:
    decision = run([version(1, Phase.STABLE)], free(pinned=0, pin_reason="cost"))
    assert phases(decision) == {1: Phase.SUPERSEDED}
    order = decision.directives["pod-0"]
    assert (order.serve, order.prefetch, order.digest) == (0, (), "")
    assert order.reason == decision.message == "no draft is pinned: cost"


def test_unpinning_goes_back_to_the_version_that_won_last() -> None:
    versions = [
        version(1, Phase.STABLE),
        version(2, Phase.SUPERSEDED),
        version(3, Phase.SUPERSEDED, proven_ms=0),
    ]
    decision = run(versions)
    assert phases(decision) == {1: Phase.SUPERSEDED, 2: Phase.STABLE, 3: Phase.SUPERSEDED}


def test_unpinning_tries_the_newest_held_version_against_what_then_serves() -> None:
    held = replace(candidate(3, BETTER, against=2), phase=Phase.HELD)
    decision = run([version(1, Phase.STABLE), version(2, Phase.SUPERSEDED), held])
    assert phases(decision) == {1: Phase.SUPERSEDED, 2: Phase.SUPERSEDED, 3: Phase.STABLE}


def test_a_pause_holds_new_versions_and_leaves_the_stable_one() -> None:
    versions = [version(1, Phase.STABLE), candidate(2, BETTER, against=1)]
    paused = run(versions, free(is_paused=True, pause_reason="release day"))
    assert phases(paused) == {1: Phase.STABLE, 2: Phase.HELD}
    assert paused.transitions[0].reason == "the rollout is paused: release day"
    resumed = run(paused.versions)
    assert phases(resumed) == {1: Phase.SUPERSEDED, 2: Phase.STABLE}


def test_a_version_that_a_pod_could_not_load_fails_and_the_one_before_serves() -> None:
    versions = [version(1, Phase.SUPERSEDED), version(2, Phase.STABLE)]
    decision = run(versions, pods=[refusing("pod-0", 2, loaded=versions[0])])
    assert phases(decision) == {1: Phase.STABLE, 2: Phase.FAILED}
    failed, resumed = decision.transitions
    assert failed.reason == "pod pod-0 could not load it: fc.weight holds values that are not finite"
    assert (failed.actor, resumed.reason) == (Actor.FLEET, "version 2 failed: the last winner serves")
    assert decision.directives["pod-0"].serve == 1


@pytest.mark.attack(
    boundary="evidence",
    attack="a pod that refuses a version which it was not directed to load, so that no pod gets it",
    outcome="only pods that were asked are heard",
)
def test_a_pod_that_serves_another_version_as_directed_refuses_none() -> None:
    versions = [version(1, Phase.SUPERSEDED), version(2, Phase.STABLE)]
    liar = refusing("pod-0", 2, loaded=versions[0])
    for directed, phase in (({"pod-0": 1}, Phase.STABLE), ({"pod-0": 2}, Phase.FAILED)):
        decision = decide(speculator(versions), [liar], NOW_MS + 1, directed=directed)
        assert phases(decision)[2] is phase


def test_one_pod_of_many_that_cannot_load_a_version_fails_no_fleet() -> None:
    stable = version(2, Phase.STABLE)
    fleet = [refusing("pod-0", 2), holding("pod-1", stable), holding("pod-2", stable)]
    decision = run([version(1, Phase.SUPERSEDED), stable], pods=fleet)
    assert phases(decision)[2] is Phase.STABLE
    assert decision.message == "version 2 is stable; waiting for 1 of 3 pods to load it"


def test_the_first_of_many_pods_to_answer_fails_no_version() -> None:
    before, stable = version(1, Phase.SUPERSEDED), version(2, Phase.STABLE)
    fleet = [holding(f"pod-{i}", before) for i in range(10)]
    directed = dict.fromkeys((pod.name for pod in fleet), 2)
    for refused in range(1, 7):
        fleet[refused] = refusing(f"pod-{refused}", 2, loaded=before)
        decision = decide(speculator([before, stable]), fleet, NOW_MS, directed=directed)
        assert phases(decision)[2] is (Phase.FAILED if refused > 5 else Phase.STABLE)


def test_a_refusal_that_is_left_of_a_version_that_serves_no_more_condemns_nothing() -> None:
    versions = [version(1, Phase.STABLE), version(2, Phase.SUPERSEDED)]
    assert phases(run(versions, free(pinned=1), [refusing("pod-0", 2)]))[2] is Phase.SUPERSEDED


def test_what_won_last_serves_again_once_its_weights_are_back() -> None:
    back = run([version(1, Phase.STABLE), version(2, Phase.SUPERSEDED)])
    assert back.transitions[1].reason == "unpinned: the last winner serves"


def test_a_pinned_version_that_fails_does_not_serve() -> None:
    versions = [version(1, Phase.SUPERSEDED), version(2, Phase.STABLE)]
    decision = run(versions, free(pinned=2), [refusing("pod-0", 2)])
    assert phases(decision) == {1: Phase.STABLE, 2: Phase.FAILED}
    assert "version 2 is pinned but cannot serve" in decision.message


def test_an_only_version_that_fails_leaves_no_draft() -> None:
    decision = run([version(1, Phase.STABLE)], pods=[refusing("pod-0", 1)])
    assert phases(decision) == {1: Phase.FAILED}
    assert decision.directives["pod-0"].serve == 0


def test_a_pod_that_names_the_version_but_holds_other_tensors_has_not_loaded_it() -> None:
    liar = Pod(name="pod-0", loaded=1, tensors_digest="sha256:" + "0" * 64)
    assert run([version(1, Phase.STABLE)], pods=[liar]).message.endswith("waiting for 1 of 1 pods to load it")


def test_a_pin_is_no_win_and_what_was_only_pinned_waits_again() -> None:
    decision = run([version(1, Phase.SUPERSEDED), version(2, Phase.STABLE, proven_ms=0)])
    assert phases(decision) == {1: Phase.STABLE, 2: Phase.REJECTED}, "unpinned, it is tried like any other"
    held = run([version(1, Phase.SUPERSEDED), version(2, Phase.STABLE, proven_ms=0)], free(pinned=1))
    assert phases(held) == {1: Phase.STABLE, 2: Phase.HELD}


def test_what_serves_goes_on_after_a_pin_if_nothing_has_ever_won() -> None:
    assert phases(run([version(1, Phase.STABLE, proven_ms=0)])) == {1: Phase.STABLE}


def test_the_last_win_counts_whatever_the_clock_says() -> None:
    late = version(1, Phase.STABLE, proven_ms=NOW_MS + 10**9)
    decision = run([late, candidate(2, BETTER, against=1)])
    assert phases(decision) == {1: Phase.SUPERSEDED, 2: Phase.STABLE}
    assert phases(run(decision.versions)) == phases(decision)


def test_a_pod_that_refuses_fails_nothing_before_the_others_had_time_to_report() -> None:
    versions = [version(1, Phase.SUPERSEDED), version(2, Phase.STABLE)]
    decision = decide(speculator(versions), [refusing("pod-0", 2)], NOW_MS, is_settled=False)
    assert phases(decision)[2] is Phase.STABLE


def test_a_held_version_is_told_with_its_reason() -> None:
    decision = run([version(1, Phase.STABLE), version(2, source=Source.IMPORTED)], pods=[holding("pod-0", version(1))])
    message = "version 1 is stable; version 2 is held: it has no evaluation: promote it to serve it"
    assert decision.message == message


def test_a_pin_keeps_only_the_newest_version_waiting() -> None:
    versions = [version(1, Phase.STABLE), candidate(2, BETTER, against=1), candidate(3, BETTER, against=1)]
    assert phases(run(versions, free(pinned=1))) == {1: Phase.STABLE, 2: Phase.SUPERSEDED, 3: Phase.HELD}


def test_promoting_an_older_waiting_version_makes_it_the_one_that_won_last() -> None:
    versions = [version(1, Phase.SUPERSEDED), version(2, Phase.HELD), version(3, Phase.STABLE)]
    transitions = promote(speculator(versions), versions[1], "it is fine", NOW_MS)
    assert [(t.number, t.after, t.reason) for t in transitions] == [
        (3, Phase.SUPERSEDED, "version 2 took over: promoted: it is fine"),
        (2, Phase.STABLE, "promoted: it is fine"),
    ]
    now = after(versions, transitions)
    assert run(now).transitions == (), "and it stays"


def test_promoting_what_is_pinned_keeps_it_after_the_pin() -> None:
    versions = [version(1, Phase.SUPERSEDED), version(2, Phase.STABLE, proven_ms=0)]
    transitions = promote(speculator(versions, free(pinned=2)), versions[1], "", NOW_MS)
    assert phases(run(after(versions, transitions))) == {1: Phase.SUPERSEDED, 2: Phase.STABLE}


def test_promoting_what_serves_already_does_nothing() -> None:
    versions = [version(1, Phase.STABLE)]
    assert promote(speculator(versions), versions[0], "", NOW_MS) == ()


@pytest.mark.parametrize(
    ("changed", "desired", "why"),
    [
        pytest.param({"phase": Phase.ROLLED_BACK}, FREE, "is RolledBack and never serves again", id="condemned"),
        pytest.param({"is_kept": False}, FREE, "its weights are no longer kept", id="swept"),
        pytest.param({}, free(pinned=1), "version 1 is pinned in default; unpin it first", id="another is pinned"),
        pytest.param({}, free(pinned=0), "no draft is pinned in default; unpin it first", id="no draft is pinned"),
    ],
)
def test_a_promotion_that_cannot_be_is_refused(changed: dict[str, Any], desired: DesiredState, why: str) -> None:
    versions = [version(1, Phase.STABLE), replace(version(2, Phase.HELD), **changed)]
    with pytest.raises(Conflict, match=why):
        promote(speculator(versions, desired), versions[1], "", NOW_MS)


def test_rejecting_what_serves_goes_back_to_the_version_that_won_before() -> None:
    versions = [version(1, Phase.SUPERSEDED), version(2, Phase.STABLE)]
    transitions = reject(speculator(versions), versions[1], "it stutters", NOW_MS)
    assert [(t.number, t.after, t.reason) for t in transitions] == [
        (2, Phase.REJECTED, "rejected: it stutters"),
        (1, Phase.STABLE, "version 2 was rejected: the last winner serves"),
    ]
    assert run(after(versions, transitions)).transitions == ()


def test_a_rejected_version_does_not_serve_even_if_it_is_pinned() -> None:
    versions = [version(1, Phase.SUPERSEDED), version(2, Phase.STABLE)]
    transitions = reject(speculator(versions, free(pinned=2)), versions[1], "", NOW_MS)
    decision = run(after(versions, transitions), free(pinned=2))
    assert phases(decision) == {1: Phase.STABLE, 2: Phase.REJECTED}


def test_rejecting_twice_is_rejecting_once() -> None:
    gone = version(2, Phase.REJECTED)
    assert reject(speculator([version(1, Phase.STABLE), gone]), gone, "", NOW_MS) == ()
