"""The outcome of a version, and a rollout on a terminal, to the letter."""

import json
from textwrap import dedent

import pytest
from tests.support.registry_answers import EVIDENCE, NOW, canary, rollout, screen, state, version

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli import output
from updraft_cli.backends import wire
from updraft_cli.backends.speculators import Outcome, RolloutStatus, has_served
from updraft_cli.cmd.rollout import view


def golden(text: str) -> str:
    return dedent(text).strip("\n")


def status(now: pb.SpeculatorState, about: pb.Version | None = None, *, has_served: bool = False) -> RolloutStatus:
    draft = wire.draft(about, now) if about else None
    return RolloutStatus.of(wire.speculator(now), draft, has_served=has_served)


def moved(before: "pb.Phase.ValueType", after: "pb.Phase.ValueType" = pb.PHASE_SUPERSEDED) -> pb.Transition:
    return pb.Transition(version=1, from_phase=before, to_phase=after, reason="why", actor="gate")


@pytest.mark.parametrize(
    ("about", "now", "expected", "exit_code"),
    [
        pytest.param(None, pb.SpeculatorState(), Outcome.NOTHING, 0, id="no version"),
        pytest.param(version(2, pb.PHASE_STABLE), state(), Outcome.PROMOTED, 0, id="stable everywhere"),
        pytest.param(
            version(2, pb.PHASE_STABLE),
            state(pods=pb.Pods(connected=3, serving_stable=2)),
            Outcome.UNDER_WAY,
            4,
            id="stable, and a pod still loads it",
        ),
        pytest.param(
            version(2, pb.PHASE_STABLE),
            state(pods=pb.Pods(connected=3, serving_stable=2, failed=1)),
            Outcome.PROMOTED,
            0,
            id="stable on all pods that can load it",
        ),
        pytest.param(version(3, pb.PHASE_CANARY), canary(), Outcome.UNDER_WAY, 4, id="tried"),
        pytest.param(version(3, pb.PHASE_HELD), state(), Outcome.UNDER_WAY, 4, id="held"),
        pytest.param(version(3, pb.PHASE_PENDING), state(), Outcome.UNDER_WAY, 4, id="pending"),
        pytest.param(version(3, pb.PHASE_REJECTED), state(), Outcome.LOST, 3, id="rejected"),
        pytest.param(version(3, pb.PHASE_ROLLED_BACK), state(), Outcome.LOST, 3, id="rolled back"),
        pytest.param(version(3, pb.PHASE_FAILED), state(), Outcome.LOST, 3, id="failed"),
        pytest.param(version(1, pb.PHASE_SUPERSEDED), state(), Outcome.LOST, 3, id="superseded before it won"),
    ],
)
def test_the_outcome_of_a_version_is_an_exit_code(
    about: pb.Version | None, now: pb.SpeculatorState, expected: Outcome, exit_code: int
) -> None:
    assert status(now, about).outcome is expected
    assert expected.exit_code == exit_code


def test_a_version_that_was_superseded_after_it_won_was_promoted() -> None:
    superseded = version(1, pb.PHASE_SUPERSEDED)
    assert status(state(), superseded, has_served=True).outcome is Outcome.PROMOTED


RETAINED = pb.Transition(reason="kept: the release of May", actor="operator")


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        pytest.param([], False, id="nothing is known"),
        pytest.param([moved(pb.PHASE_UNSPECIFIED, pb.PHASE_PENDING), moved(pb.PHASE_HELD)], False, id="never"),
        pytest.param([moved(pb.PHASE_CANARY, pb.PHASE_STABLE), moved(pb.PHASE_STABLE)], True, id="once"),
        pytest.param([moved(pb.PHASE_STABLE), RETAINED, RETAINED], True, id="and it was retained since"),
        pytest.param([moved(pb.PHASE_HELD), RETAINED], False, id="never, and it was retained since"),
    ],
)
def test_a_superseded_version_has_served_if_it_was_stable_before(
    history: list[pb.Transition], *, expected: bool
) -> None:
    assert has_served(map(wire.history_entry, history)) is expected


def test_a_canary_is_a_sentence_and_a_table() -> None:
    now = status(canary(), version(3, pb.PHASE_CANARY))
    assert screen(view.rendered(now, NOW, is_wide=False)) == golden("""
        Version 3 is in canary on 2 of 16 pods (step 1 of 2): acceptance is
        significantly higher; step 2 in 48 s.

                           candidate  stable  change
        version            3          2
        pods               2          14
        tokens per step    1.67       1.55    +7.5 % (+1.2 to +14.1 %)
        ms between tokens  31.2       31.5    -1.0 % (-3.0 to +1.1 %)

        step      1 of 2: 10 % of the pods for 2 min, since 1 min 12 s
        evidence  1,421 requests with the candidate, 12 slices, compared by pods
        failures  1 (2 tolerated)
        verdict   not yet known
        deadline  11 min of 15 min left; then, without a verdict, it is rolled back
    """)


def test_a_first_version_has_no_deadline() -> None:
    now = status(canary(rollout=rollout(baseline=0)), version(3, pb.PHASE_CANARY))
    (line,) = [line for line in screen(view.rendered(now, NOW, is_wide=False)).splitlines() if "deadline" in line]
    assert "a first version is not rolled back for a lack of traffic" in line


def test_wide_a_canary_has_the_registrys_own_words_for_the_evidence() -> None:
    now = status(canary(), version(3, pb.PHASE_CANARY))
    assert screen(view.rendered(now, NOW, is_wide=True), 200).splitlines()[-1] == output.sentence(EVIDENCE)


def test_a_canary_that_has_just_begun_says_so_and_has_no_numbers() -> None:
    young = rollout(slices=0, candidate_requests=1, comparison=pb.COMPARISON_SWITCHBACK)
    young.ClearField("acceptance_length")
    young.inter_token_latency.high_percent = float("inf")
    now = status(canary(rollout=young, paused=True, pause_reason="lunch"), version(3, pb.PHASE_CANARY))
    assert screen(view.rendered(now, NOW, is_wide=False), 100) == golden("""
        Version 3 is in canary on 2 of 16 pods (step 1 of 2): acceptance is significantly higher: 1.67
        against 1.55 tokens per step, +7.5 % (+1.2 to +14.1 % at 95 %); step 2 in 48 s.

                           candidate  stable  change
        version            3          2
        tokens per step    -          -       not enough data yet
        ms between tokens  31.2       31.5    -1.0 % (no bounds yet)

        step      1 of 2: 10 % of the pods for 2 min, since 1 min 12 s
        evidence  1 request with the candidate, 0 slices, compared by switchback
        failures  1 (2 tolerated)
        verdict   not yet known
        deadline  11 min of 15 min left while not paused; then, without a verdict, it is rolled back
        paused    yes: lunch
    """)


def test_while_nothing_is_tried_it_tells_what_serves_and_what_became_of_the_newest() -> None:
    lost = version(3, pb.PHASE_REJECTED, "rejected: bad answers")
    now = status(state(latest=3, pinned=2, pin_reason="to compare"), lost)
    assert screen(view.rendered(now, NOW, is_wide=False)) == golden("""
        Version 2 is stable.

        stable    version 2, 1.55 tokens per step
        newest    version 3, rejected 1 h ago: bad answers
        previous  version 1: the fallback after a failure
        pods      16 connected, 16 with version 2
        policy    canary: 10 % of the pods for 2 min, then 50 % for 1 min 30 s
        pinned    version 2: to compare
    """)


def test_a_speculator_that_nobody_knows_is_reported_as_unknown() -> None:
    now = status(pb.SpeculatorState(speculator="other"), None)
    assert screen(view.rendered(now, NOW, is_wide=False)).splitlines()[0] == "Nothing is known about other."


def test_bounds_that_are_not_known_are_null_for_a_program() -> None:
    young = rollout()
    young.acceptance_length.high_percent = float("inf")
    found = json.loads(output.as_json(status(canary(rollout=young), version(3, pb.PHASE_CANARY))))
    assert found["outcome"] == "under way"
    assert found["trial"]["step"] == 1
    assert found["trial"]["acceptance_length"]["low_percent"] is None
    assert found["trial"]["inter_token_latency_s"]["high_percent"] == 1.1


def test_the_json_of_a_rollout_keeps_its_names() -> None:
    content = json.loads(output.as_json(status(state(pods=pb.Pods(connected=3, serving_stable=2, failed=1)))))
    assert content["speculator"] == content["name"] == "default"
    assert {name: content["pods"][name] for name in ("connected", "serving_stable", "serving_candidate", "failed")} == {
        "connected": 3,
        "serving_stable": 2,
        "serving_candidate": 0,
        "failed": 1,
    }
