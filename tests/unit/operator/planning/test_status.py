"""The status of a speculator, and when a time in it changes."""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.manifests import speculator
from tests.support.observed import NOW, connected, observed, pod, ready_pods, traffic, version

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api.status import Condition, Status
from updraft_operator.planning.assessment import Assessment, dated
from updraft_operator.planning.observed import ConnectionState, RegistryView, moment, moment_ms
from updraft_operator.planning.plan import written
from updraft_operator.planning.status import status, without_measurements

BEFORE = NOW - timedelta(hours=1)


def _verdict(status: Any = "True", reason: str = "Ready") -> Assessment:
    return Assessment(status, reason, "x")


def _condition(verdict: Assessment, **more: Any) -> Condition:
    (made,) = dated({"Ready": verdict}, [], 1, BEFORE)
    return made.model_copy(update=more)


@pytest.mark.parametrize(
    ("before", "now", "at"),
    [
        pytest.param([], _verdict(), NOW, id="the first one"),
        pytest.param([_condition(_verdict())], _verdict(), BEFORE, id="the same"),
        pytest.param([_condition(_verdict(reason="Other"))], _verdict(), BEFORE, id="another reason"),
        pytest.param([_condition(_verdict("False"))], _verdict(), NOW, id="another status"),
        pytest.param([_condition(_verdict("Unknown"))], _verdict("False"), NOW, id="known now"),
        pytest.param([_condition(_verdict(), type="Other")], _verdict(), NOW, id="one of another type"),
    ],
)
def test_the_time_of_a_condition_changes_with_its_status_only(before: Any, now: Assessment, at: Any) -> None:
    (made,) = dated({"Ready": now}, before, 7, NOW)
    assert made.last_transition_time == at
    assert (made.reason, made.observed_generation) == (now.reason, 7)


def test_moments_are_whole_seconds_and_zero_is_none() -> None:
    assert moment(1.9) == moment(1.0)
    assert moment_ms(0) is None
    assert moment_ms(1500) == moment(1)


def test_versions_and_rollout_are_the_registrys() -> None:
    running = pb.Rollout(candidate=4, baseline=3, step=1, steps=2, started_unix_ms=5000, step_since_unix_ms=9000)
    view = connected([version(3), version(4, pb.PHASE_CANARY)], rollout=running, message="it is tried", previous=2)
    new = status(observed(registry=view), NOW)
    assert new.versions is not None
    assert new.rollout is not None
    assert (new.versions.stable, new.versions.candidate, new.versions.previous, new.versions.latest) == (3, 4, 2, 4)
    assert (new.rollout.phase, new.rollout.version, new.rollout.baseline) == ("Canary", 4, 3)
    assert (new.rollout.step, new.rollout.steps) == (2, 2)
    assert (new.rollout.start_time, new.rollout.step_start_time) == (moment(5), moment(9))
    assert new.rollout.message == "it is tried"


def test_a_registry_that_is_away_leaves_what_it_said_last() -> None:
    view = connected([version(3)], traffic=[traffic(3, 2.5)])
    before = status(observed(registry=view), NOW)
    away = observed(
        speculator=speculator(status=written(before)),
        registry=RegistryView(connection=ConnectionState.UNREACHABLE, problem="x"),
    )
    after = status(away, NOW)
    assert (after.versions, after.rollout, after.acceptance) == (before.versions, before.rollout, before.acceptance)


def test_pods_are_counted_as_they_are() -> None:
    pods = (
        pod("a", is_ready=True),
        pod("b", problem=("OOMKilled", "x")),
        pod("c", is_ready=True, is_ending=True),
        pod("d", is_finished=True, problem=("CrashLoopBackOff", "Evicted")),
        pod("t", "trainer", is_ready=True),
    )
    serving = status(observed(pods=pods), NOW).serving
    assert serving is not None
    assert (serving.replicas, serving.ready_replicas, serving.failed_replicas) == (2, 1, 2)
    assert serving.selector == "app.kubernetes.io/component=serving,updraft.dev/speculator=qwen"
    assert serving.url == "http://qwen.team.svc/v1"


def test_acceptance_is_told_in_decimals_and_thousands_of_steps() -> None:
    view = connected([version(3), version(4, pb.PHASE_CANARY)], traffic=[traffic(3, 2.5, 12_999), traffic(4, 2.75, 10)])
    acceptance = status(observed(registry=view), NOW).acceptance
    assert acceptance is not None
    assert (acceptance.stable, acceptance.candidate, acceptance.verify_steps) == ("2.50", "2.80", 12_000)


def test_what_speculation_is_worth_is_told_in_decimals() -> None:
    view = connected([version(3)], speedup=pb.Speedup(ratio=1.234, low=1.2, high=1.268))
    acceptance = status(observed(registry=view), NOW).acceptance
    assert acceptance is not None
    assert (acceptance.speedup, acceptance.speedup_low, acceptance.speedup_high) == ("1.23", "1.20", "1.27")


def test_acceptance_is_told_by_domain_for_stable_version_and_candidate() -> None:
    served = [traffic(3, 2.5), traffic(4, 2.8)]
    served[0].domains.add(domain="sql", verify_steps=100, tokens=300)
    served[0].domains.add(domain="chat", verify_steps=50, tokens=100)
    served[1].domains.add(domain="sql", verify_steps=10, tokens=31)
    view = connected([version(3), version(4, pb.PHASE_CANARY)], traffic=served)
    acceptance = status(observed(registry=view), NOW).acceptance
    assert acceptance is not None
    assert [(one.domain, one.stable, one.candidate) for one in acceptance.domains or ()] == [
        ("sql", "3.00", "3.10"),
        ("chat", "2.00", None),
    ]


def test_versions_without_a_domain_in_common_are_told_by_the_largest_and_the_rest() -> None:
    served = [traffic(3, 2.5), traffic(4, 2.8)]
    for number, of_version in enumerate(served):
        for place in range(16):
            of_version.domains.add(domain=f"d{number}-{place:02d}", verify_steps=100 - place, tokens=300)
        of_version.domains.add(domain="other", verify_steps=5, tokens=10)
    view = connected([version(3), version(4, pb.PHASE_CANARY)], traffic=served)
    acceptance = status(observed(registry=view), NOW).acceptance
    assert acceptance is not None
    assert [one.domain for one in acceptance.domains or ()] == [*(f"d0-{place:02d}" for place in range(16)), "other"]


@pytest.mark.parametrize(
    ("spec", "world", "state"),
    [
        pytest.param({}, {"pods": ready_pods()}, "Training", id="runs"),
        pytest.param({}, {}, "Starting", id="starts"),
        pytest.param({"trainer": {"suspend": True}}, {}, "Suspended", id="suspended"),
        pytest.param({"traces": {"enabled": False}}, {}, "Disabled", id="no traces"),
        pytest.param({}, {"pods": (pod("t", "trainer", problem=("OOMKilled", "x")),)}, "Failing", id="fails"),
    ],
)
def test_the_trainers_state_is_one_word(spec: dict[str, Any], world: dict[str, Any], state: str) -> None:
    trainer = status(observed(spec, **world), NOW).trainer
    assert trainer is not None
    assert trainer.state == state


def test_the_last_publication_of_the_trainer_outlives_its_version() -> None:
    view = connected([version(3), version(5, source=pb.SOURCE_IMPORTED)])
    first = status(observed(registry=view), NOW)
    assert first.trainer is not None
    assert first.trainer.last_publish_time == moment(3)
    again = observed(speculator=speculator(status=written(first)), registry=connected())
    later = status(again, NOW).trainer
    assert later is not None
    assert later.last_publish_time == moment(3)


def test_why_the_trainer_publishes_nothing_is_in_its_status_and_is_kept_while_the_registry_is_away() -> None:
    why = "the draft of 340 samples waits for 8 held-out requests of today's traffic, has 5"
    first = status(observed(registry=connected([version(3)], trainer_message=why)), NOW)
    assert first.trainer is not None
    assert first.trainer.message == why
    later = status(observed(speculator=speculator(status=written(first))), NOW).trainer
    assert later is not None
    assert later.message == why
    silent = status(observed(speculator=speculator(status=written(first)), registry=connected([version(3)])), NOW)
    assert silent.trainer is not None
    assert silent.trainer.message is None


def test_the_last_failure_is_the_newest_and_is_remembered() -> None:
    lost = [version(1, pb.PHASE_REJECTED), version(2, pb.PHASE_ROLLED_BACK), version(3)]
    first = status(observed(registry=connected(lost)), NOW)
    assert first.last_failure is not None
    assert (first.last_failure.version, first.last_failure.reason) == (2, "RolledBack")
    later = status(observed(speculator=speculator(status=written(first)), registry=connected([version(3)])), NOW)
    assert later.last_failure == first.last_failure


@given(
    length=st.floats(1.0, 9.0),
    steps=st.integers(1, 10**6),
    message=st.text(max_size=2000),
)
def test_a_status_that_was_written_reads_back_as_it_was(length: float, steps: int, message: str) -> None:
    view = connected([version(3), version(2, pb.PHASE_REJECTED)], traffic=[traffic(3, length, steps)], message=message)
    new = status(observed(registry=view, pods=ready_pods()), NOW)
    assert Status.model_validate(written(new)) == new
    assert status(observed(speculator=speculator(status=written(new)), registry=view, pods=ready_pods()), NOW) == new


def test_measurements_are_what_changes_with_every_request() -> None:
    views = [
        connected(
            [version(3)],
            traffic=[traffic(3, length)],
            message=f"{length}",
            trainer_message=f"{length}",
            learning=pb.Learning(
                samples=round(length), steps=round(length), too_small=f"requests of {length} MB, the mean"
            ),
        )
        for length in (2.0, 3.0)
    ]
    first, second = (status(observed(registry=view, pods=ready_pods()), NOW) for view in views)
    assert first != second
    assert without_measurements(first) == without_measurements(second)


def _reported(**learning: Any) -> Status:
    phases = [pb.PhaseShare(phase="forward", share=0.412), pb.PhaseShare(phase="data", share=0.1)]
    reported = pb.Learning(device="NVIDIA H100", world_size=2, phases=phases)
    reported.MergeFrom(pb.Learning(**learning))
    return status(observed(registry=connected([version(1)], learning=reported)), NOW)


def test_the_trainers_progress_is_told_in_whole_numbers() -> None:
    new = _reported(tokens_per_second=51_234.6, flops_utilization=0.434, steps_to_estimate=12, last_save_unix_ms=5_000)
    assert new.trainer is not None
    assert new.trainer.progress is not None
    assert written(new.trainer.progress) == {
        "device": "NVIDIA H100",
        "ranks": 2,
        "tokensPerSecond": 51_235,
        "flopsUtilizationPercent": 43,
        "phases": [{"phase": "forward", "percent": 41}, {"phase": "data", "percent": 10}],
        "stepsToEstimate": 12,
        "lastSaveTime": "1970-01-01T00:00:05Z",
    }


def test_a_trainer_on_a_cpu_has_no_utilization_and_one_that_is_silent_no_progress() -> None:
    on_cpu, silent = _reported().trainer, status(observed(registry=connected([version(1)])), NOW).trainer
    assert on_cpu is not None
    assert on_cpu.progress is not None
    assert on_cpu.progress.flops_utilization_percent is None
    assert silent is not None
    assert silent.progress is None


def test_another_pace_is_no_news_but_another_device_is() -> None:
    before = without_measurements(_reported(tokens_per_second=100.0, steps_to_estimate=3))
    assert without_measurements(_reported(tokens_per_second=900.0, steps_to_estimate=9)) == before
    assert without_measurements(_reported(device="cpu (1 thread)")) != before
