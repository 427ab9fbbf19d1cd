"""Who serves what: named cases first, then a state machine that does everything at random and checks what
must hold.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.support.versions import NOW_MS, evaluation, holding, refusing, version

from updraft_registry.rollout import Decision, Pod, decide
from updraft_registry.version import Actor, Phase, Policy, Source, Strategy, Version, Wish

BETTER, WORSE = 3.0, 1.5


def phases(decision: Decision) -> dict[int, Phase]:
    return {version.number: version.phase for version in decision.versions}


def run(versions: Sequence[Version], wish: Wish = Wish(), pods: Sequence[Pod] = ()) -> Decision:  # noqa: B008 - frozen
    return decide(wish, versions, pods or [Pod(name="pod-0")], NOW_MS + 1)


def candidate(number: int, quality: float, *, against: int, source: Source = Source.TRAINER) -> Version:
    return version(number, evaluation=evaluation(quality, against=against), source=source)


@pytest.mark.parametrize("source", [Source.INITIAL, Source.IMPORTED])
def test_the_first_version_skips_the_gate(source: Source) -> None:
    decision = run([version(1, source=source)])
    assert phases(decision) == {1: Phase.STABLE}
    assert decision.transitions[0].reason == "the first version skips the gate"
    assert decision.orders["pod-0"].serve == 1


def test_a_first_version_that_was_evaluated_has_to_pass() -> None:
    assert phases(run([candidate(1, 1.0, against=0, source=Source.IMPORTED)])) == {1: Phase.REJECTED}


def test_a_trainers_first_version_without_an_evaluation_is_rejected() -> None:
    decision = run([version(1)])
    assert phases(decision) == {1: Phase.REJECTED}
    assert decision.orders["pod-0"].serve == 0
    assert decision.message == "no version serves; waiting for the first that passes the gate"


def test_a_better_candidate_takes_over_at_once() -> None:
    decision = run([version(1, Phase.STABLE), candidate(2, BETTER, against=1)])
    assert phases(decision) == {1: Phase.SUPERSEDED, 2: Phase.STABLE}
    stepped_down, promoted = decision.transitions
    assert stepped_down.reason.startswith("version 2 took over: acceptance length 3.0")
    assert (promoted.actor, promoted.before) == (Actor.GATE, Phase.PENDING)
    order = decision.orders["pod-0"]
    assert (order.serve, order.prefetch, order.phase) == (2, (2,), Phase.STABLE)
    assert order.digest == version(2).digest


def test_a_candidate_that_does_not_beat_the_serving_version_is_rejected_with_the_numbers() -> None:
    decision = run([version(1, Phase.STABLE), candidate(2, WORSE, against=1)])
    assert phases(decision) == {1: Phase.STABLE, 2: Phase.REJECTED}
    assert "acceptance length 1.5" in decision.transitions[0].reason
    assert decision.orders["pod-0"].serve == 1


def test_a_trainers_candidate_that_was_compared_with_another_version_is_rejected() -> None:
    decision = run([version(1, Phase.SUPERSEDED), version(2, Phase.STABLE), candidate(3, BETTER, against=1)])
    assert phases(decision)[3] is Phase.REJECTED
    assert decision.transitions[0].reason == "compared with version 1 but version 2 serves"


def test_what_a_person_brought_without_an_evaluation_waits_for_that_person() -> None:
    decision = run([version(1, Phase.STABLE), version(2, source=Source.IMPORTED)])
    assert phases(decision) == {1: Phase.STABLE, 2: Phase.HELD}
    assert decision.transitions[0].reason == "it comes without an evaluation: pin it to serve it"


def test_only_the_newest_waiting_version_is_tried() -> None:
    decision = run(
        [version(1, Phase.STABLE), candidate(2, BETTER, against=1), candidate(3, BETTER, against=1)],
    )
    assert phases(decision) == {1: Phase.SUPERSEDED, 2: Phase.SUPERSEDED, 3: Phase.STABLE}
    assert decision.transitions[0].reason == "version 3 is newer"


def test_manual_holds_what_passed_the_gate() -> None:
    manual = Wish(policy=Policy(strategy=Strategy.MANUAL))
    versions = [version(1, Phase.STABLE), candidate(2, BETTER, against=1)]
    assert phases(run(versions, manual)) == {1: Phase.STABLE, 2: Phase.HELD}
    assert phases(run([versions[0], candidate(2, WORSE, against=1)], manual))[2] is Phase.REJECTED


def test_manual_lets_the_first_version_serve() -> None:
    first = [version(1, source=Source.INITIAL)]
    assert phases(run(first, Wish(policy=Policy(strategy=Strategy.MANUAL)))) == {1: Phase.STABLE}


def test_a_pin_goes_back_without_analysis_and_holds_newer_versions() -> None:
    versions = [version(1, Phase.SUPERSEDED), version(2, Phase.STABLE), candidate(3, BETTER, against=2)]
    decision = run(versions, Wish(pinned=1, pin_reason="2 is slow"))
    assert phases(decision) == {1: Phase.STABLE, 2: Phase.SUPERSEDED, 3: Phase.HELD}
    assert {t.reason for t in decision.transitions} == {
        "version 1 is pinned: 2 is slow",
        "version 1 took over: version 1 is pinned: 2 is slow",
    }
    assert {t.actor for t in decision.transitions} == {Actor.OPERATOR}
    assert decision.orders["pod-0"].serve == 1


def test_a_pin_goes_forward_to_a_version_that_was_never_judged() -> None:
    decision = run([version(1, Phase.STABLE), candidate(2, WORSE, against=1)], Wish(pinned=2))
    assert phases(decision) == {1: Phase.SUPERSEDED, 2: Phase.STABLE}


def test_a_pin_to_zero_serves_without_a_draft() -> None:
    decision = run([version(1, Phase.STABLE)], Wish(pinned=0, pin_reason="cost"))
    assert phases(decision) == {1: Phase.SUPERSEDED}
    order = decision.orders["pod-0"]
    assert (order.serve, order.prefetch, order.digest) == (0, (), "")
    assert order.reason == decision.message == "no draft is pinned: cost"


def test_unpinning_goes_back_to_the_newest_version_that_has_won() -> None:
    versions = [
        version(1, Phase.STABLE),
        version(2, Phase.SUPERSEDED),
        version(3, Phase.SUPERSEDED, is_proven=False),
    ]
    decision = run(versions)
    assert phases(decision) == {1: Phase.SUPERSEDED, 2: Phase.STABLE, 3: Phase.SUPERSEDED}


def test_unpinning_tries_the_newest_held_version_against_what_then_serves() -> None:
    held = replace(candidate(3, BETTER, against=2), phase=Phase.HELD)
    decision = run([version(1, Phase.STABLE), version(2, Phase.SUPERSEDED), held])
    assert phases(decision) == {1: Phase.SUPERSEDED, 2: Phase.SUPERSEDED, 3: Phase.STABLE}


def test_a_pause_holds_new_versions_and_leaves_the_stable_one() -> None:
    versions = [version(1, Phase.STABLE), candidate(2, BETTER, against=1)]
    paused = run(versions, Wish(is_paused=True, pause_reason="release day"))
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
    assert (failed.actor, resumed.reason) == (Actor.FLEET, "version 2 failed: back to what served before")
    assert decision.orders["pod-0"].serve == 1


def test_one_pod_of_many_that_cannot_load_a_version_fails_no_fleet() -> None:
    stable = version(2, Phase.STABLE)
    fleet = [refusing("pod-0", 2), holding("pod-1", stable), holding("pod-2", stable)]
    decision = run([version(1, Phase.SUPERSEDED), stable], pods=fleet)
    assert phases(decision)[2] is Phase.STABLE
    assert decision.message == "version 2 is stable; waiting for 1 of 3 pods to load it"


def test_a_pinned_version_that_fails_does_not_serve() -> None:
    versions = [version(1, Phase.SUPERSEDED), version(2, Phase.STABLE)]
    decision = run(versions, Wish(pinned=2), [refusing("pod-0", 2)])
    assert phases(decision) == {1: Phase.STABLE, 2: Phase.FAILED}
    assert "version 2 is pinned but cannot serve" in decision.message


def test_an_only_version_that_fails_leaves_no_draft() -> None:
    decision = run([version(1, Phase.STABLE)], pods=[refusing("pod-0", 1)])
    assert phases(decision) == {1: Phase.FAILED}
    assert decision.orders["pod-0"].serve == 0


def test_a_pod_that_names_the_version_but_holds_other_tensors_has_not_loaded_it() -> None:
    liar = Pod(name="pod-0", loaded=1, tensors_digest="sha256:" + "0" * 64)
    assert run([version(1, Phase.STABLE)], pods=[liar]).message.endswith("waiting for 1 of 1 pods to load it")


class Rollout(RuleBasedStateMachine):
    """Everything that can happen to a speculator, in any order, with a clock that also runs backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: tuple[Version, ...] = ()
        self.wish = Wish()
        self.pods: dict[str, Pod] = {"pod-0": Pod(name="pod-0")}
        self.now_ms = NOW_MS
        self.condemned: set[int] = set()
        self.pinned: set[int | None] = set()
        self.winners: set[int | None] = set()
        self.decision = self.decide()

    def decide(self) -> Decision:
        proven = {v.number for v in self.versions if v.is_proven}
        decision = decide(self.wish, self.versions, list(self.pods.values()), self.now_ms)
        self.versions = decision.versions
        if self.wish.is_paused and self.wish.pinned is None:
            assert {v.number for v in self.versions if v.is_proven} == proven, "nothing new serves while paused"
        self.condemned |= {v.number for v in decision.versions if v.phase.is_condemned}
        self.decision = decision
        return decision

    @property
    def serving(self) -> int:
        return max((v.number for v in self.versions if v.phase is Phase.STABLE), default=0)

    @rule(
        quality=st.sampled_from([None, BETTER, WORSE, 2.0]),
        stale=st.booleans(),
        source=st.sampled_from(list(Source)),
        decided=st.booleans(),
    )
    def publish(self, quality: float | None, stale: bool, source: Source, decided: bool) -> None:  # noqa: FBT001 - drawn
        number = len(self.versions) + 1
        against = self.serving + (1 if stale else 0)
        if quality is not None and quality > (2.0 if against else 1.0):
            self.winners.add(number)
        told = None if quality is None else evaluation(quality, against=against)
        self.versions = (*self.versions, version(number, evaluation=told, source=source))
        if decided:
            self.decide()

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        kept = [0] + [v.number for v in self.versions if not v.phase.is_condemned]
        self.wish = replace(self.wish, pinned=data.draw(st.sampled_from(kept)))
        self.pinned.add(self.wish.pinned)
        self.decide()

    @rule()
    def unpin(self) -> None:
        self.wish = replace(self.wish, pinned=None)
        self.decide()

    @rule(is_paused=st.booleans(), strategy=st.sampled_from(list(Strategy)))
    def set_wish(self, is_paused: bool, strategy: Strategy) -> None:  # noqa: FBT001 - drawn
        self.wish = replace(self.wish, is_paused=is_paused, policy=Policy(strategy=strategy))
        self.decide()

    @rule(name=st.sampled_from(["pod-0", "pod-1", "pod-2"]), loads=st.booleans())
    def obey(self, name: str, loads: bool) -> None:  # noqa: FBT001 - drawn
        order = self.decision.orders.get(name)
        if order is None or order.serve == 0:
            self.pods[name] = Pod(name=name)
        else:
            served = self.versions[order.serve - 1]
            self.pods[name] = holding(name, served) if loads else refusing(name, order.serve)
        self.decide()

    @precondition(lambda self: len(self.pods) > 1)
    @rule(data=st.data())
    def vanish(self, data: st.DataObject) -> None:
        del self.pods[data.draw(st.sampled_from(sorted(self.pods)))]
        self.decide()

    @rule(step_ms=st.integers(-10_000, 10_000))
    def time_passes(self, step_ms: int) -> None:
        self.now_ms += step_ms
        self.decide()

    @invariant()
    def at_most_one_version_is_stable(self) -> None:
        assert sum(v.phase is Phase.STABLE for v in self.versions) <= 1

    @invariant()
    def every_pod_is_told_the_stable_version(self) -> None:
        stable = max((v.number for v in self.decision.versions if v.phase is Phase.STABLE), default=0)
        assert {order.serve for order in self.decision.orders.values()} <= {stable}
        assert all((order.serve in order.prefetch) == bool(order.serve) for order in self.decision.orders.values())

    @invariant()
    def a_condemned_version_stays_condemned_and_is_never_served(self) -> None:
        assert {v.number for v in self.versions if v.phase.is_condemned} == self.condemned
        assert not {order.serve for order in self.decision.orders.values()} & self.condemned

    @invariant()
    def deciding_again_changes_nothing(self) -> None:
        decision = self.decide()
        again = self.decide()
        assert again.transitions == ()
        assert (again.versions, again.orders, again.message) == (
            decision.versions,
            decision.orders,
            decision.message,
        )

    @invariant()
    def a_pin_wins_unless_the_version_is_condemned(self) -> None:
        self.decide()
        if self.wish.pinned is not None and self.wish.pinned not in self.condemned:
            assert self.serving == self.wish.pinned

    @invariant()
    def what_a_trainer_brought_served_only_if_it_won_or_was_pinned(self) -> None:
        served = {v.number for v in self.versions if v.is_proven and v.source is Source.TRAINER}
        assert served <= self.winners | self.pinned

    @invariant()
    def nothing_is_pending_once_decided(self) -> None:
        self.decide()
        assert not any(v.phase is Phase.PENDING for v in self.versions)

    @invariant()
    def every_transition_has_a_reason(self) -> None:
        assert all((t.reason and t.before != t.after) or t.after is Phase.HELD for t in self.decision.transitions)


TestRollout = Rollout.TestCase
TestRollout.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
