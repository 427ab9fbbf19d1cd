"""What of a registry's state is news, and what is a measurement that is told at its own pace."""

from typing import Any

import pytest

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.registry_connections import _without_measurements
from updraft_registry.rollout import canary


def _state(**more: Any) -> pb.SpeculatorState:
    running = pb.Rollout(candidate=4, baseline=3, step=0, steps=2, started_unix_ms=1)
    learning = pb.Learning(samples=1, steps=1)
    roles = {"stable": 3, "candidate": 4, "latest": 4}
    fields = {**roles, "message": "10 requests", "rollout": running, "learning": learning}
    return pb.SpeculatorState(**{**fields, **more})


def _learning(**more: Any) -> pb.SpeculatorState:
    return _state(learning=pb.Learning(**{"samples": 1, "steps": 1, **more}))


def _with_rollout(**more: Any) -> pb.SpeculatorState:
    state = _state()
    state.rollout.MergeFrom(pb.Rollout(**more))
    return state


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(_state(message="11 requests"), id="its sentence"),
        pytest.param(_state(trainer_message="not sure yet"), id="the trainer's sentence"),
        pytest.param(_learning(samples=2, steps=9, estimates=4, held_out=1), id="how much was learned"),
        pytest.param(_state(speedup=pb.Speedup(ratio=1.2, low=1.1, high=1.3)), id="what speculation is worth"),
        pytest.param(_state(traffic=[pb.VersionTraffic(version=3, tokens=5)]), id="traffic"),
        pytest.param(_with_rollout(acceptance_length=pb.Estimate(candidate=2.0)), id="acceptance"),
        pytest.param(_with_rollout(inter_token_latency=pb.Estimate(candidate=0.1)), id="latency"),
        pytest.param(_with_rollout(candidate_requests=11, slices=3), id="evidence in numbers"),
        pytest.param(_with_rollout(evidence="it seems better"), id="evidence in words"),
        pytest.param(_with_rollout(paused_ms=10), id="time of a pause"),
    ],
)
def test_measurements_are_no_news(state: pb.SpeculatorState) -> None:
    assert _without_measurements(state) == _without_measurements(_state())


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(_state(stable=4), id="stable"),
        pytest.param(_learning(too_small="replay has room for 3 requests"), id="something is too small"),
        pytest.param(_learning(samples=0), id="no samples"),
        pytest.param(_learning(device="cpu (1 thread)"), id="another device"),
        pytest.param(_learning(world_size=2), id="another number of ranks"),
        pytest.param(_learning(samples=1, samples_to_start=8), id="too few samples to start"),
        pytest.param(_state(candidate=0), id="candidate"),
        pytest.param(_state(latest=5), id="latest"),
        pytest.param(_state(pinned=0), id="a pin to no draft"),
        pytest.param(_state(paused=True), id="a pause"),
        pytest.param(_state(pods=pb.Pods(connected=1)), id="pods"),
        pytest.param(_state(policy=pb.RolloutPolicy(revision_history_limit=1)), id="policy"),
        pytest.param(_with_rollout(step=1), id="a step"),
        pytest.param(_with_rollout(verdict=pb.VERDICT_PASS), id="a verdict"),
        pytest.param(_state(message="no verdict within 900 s: promote or reject it"), id="a person has to act"),
    ],
)
def test_whatever_a_person_would_act_on_is_news(state: pb.SpeculatorState) -> None:
    assert _without_measurements(state) != _without_measurements(_state())


def test_the_first_estimate_of_a_draft_without_steps_is_news() -> None:
    before, estimated, again = (_learning(steps=0, estimates=number) for number in (0, 1, 2))
    assert _without_measurements(before) != _without_measurements(estimated)
    assert _without_measurements(estimated) == _without_measurements(again)


def test_what_is_too_small_is_no_news_again_with_every_trace() -> None:
    sentences = [_learning(too_small=f"replay has room for {number} requests") for number in (3, 4)]
    assert _without_measurements(sentences[0]) == _without_measurements(sentences[1])


def test_asking_leaves_the_state_as_it_was() -> None:
    state = _with_rollout(evidence="x")
    _without_measurements(state)
    assert state == _with_rollout(evidence="x")


def test_the_registry_says_it_in_the_words_that_are_looked_for() -> None:
    from pathlib import Path

    from updraft_operator.planning.conditions import ASKS_A_PERSON

    assert Path(canary.__file__).read_text().count(ASKS_A_PERSON) == 2
