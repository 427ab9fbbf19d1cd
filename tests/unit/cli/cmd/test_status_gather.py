import math
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli import output
from updraft_cli.backends.installation import Installation
from updraft_cli.backends.wire import acceptance_of, phase, speculator
from updraft_cli.cmd.status.view import rendered
from updraft_cli.local.metrics import serving, training
from updraft_cli.local.scrape import parse
from updraft_inference.metrics import Metrics as InferenceMetrics
from updraft_trainer.metrics import Metrics as TrainerMetrics


def test_serving_is_read_from_the_metrics_that_inference_really_has() -> None:
    registry = CollectorRegistry()
    metrics = InferenceMetrics(registry)
    metrics.output_tokens.inc(12)
    metrics.draft_version.set(3)
    metrics.swaps.labels(outcome="swapped").inc(2)
    metrics.swaps.labels(outcome="refused").inc()
    metrics.captured.labels(kind="payload").inc(4)
    metrics.captured.labels(kind="light").inc()
    metrics.capture_dropped.labels(reason="queue_full").inc(7)
    for length in (2.0, 3.0):
        metrics.acceptance_length.labels(drafter="eagle3").observe(length)
    found = serving(parse(generate_latest(registry).decode()))
    assert (found.output_tokens, found.draft_version, found.swaps, found.captured) == (12, 3, 2, 5)
    assert found.capture_dropped == {"queue_full": 7}
    assert found.acceptance_length == {"eagle3": 2.5}


def test_a_count_that_is_no_number_counts_as_nothing() -> None:
    registry = CollectorRegistry()
    metrics = InferenceMetrics(registry)
    metrics.draft_version.set(math.nan)
    metrics.capture_dropped.labels(reason="queue_full").inc(math.inf)
    found = serving(parse(generate_latest(registry).decode()))
    assert (found.draft_version, found.capture_dropped) == (0, {})


@pytest.mark.parametrize(
    ("variant", "line"),
    [
        ("avx512", "C++ kernels: avx512"),
        (
            "torch",
            (
                "no C++ kernels: the engine uses torch's operations, which are slower on a CPU."
                " Expected on a GPU and with UPDRAFT_INFERENCE_KERNELS=off; otherwise, the inference log has the reason"
            ),
        ),
        ("", None),
    ],
)
def test_status_shows_which_kernels_the_engine_uses(variant: str, line: str | None) -> None:
    registry = CollectorRegistry()
    InferenceMetrics(registry).observe_kernels(variant)
    found = serving(parse(generate_latest(registry).decode()))
    console = Console(width=200)
    with console.capture() as capture:
        console.print(
            rendered(Installation(processes=(), speculators=(), serving=found), datetime.now(UTC), is_wide=False)
        )
    shown = [shown.strip() for shown in capture.get().splitlines() if "kernels" in shown]
    assert shown == ([] if line is None else [line])


def test_training_is_read_from_the_metrics_that_the_trainer_really_has() -> None:
    registry = CollectorRegistry()
    metrics = TrainerMetrics(registry)
    metrics.steps.inc(5)
    metrics.trained_rows.inc(100)
    metrics.loss.set(1.5)
    metrics.admitted.labels(split="train").inc(9)
    metrics.acceptance_length.labels(role="candidate").set(2.25)
    metrics.publishes.labels(outcome="stable").inc()
    found = training(parse(generate_latest(registry).decode()))
    assert (found.optimizer_steps, found.trained_tokens, found.loss) == (5, 100, 1.5)
    assert found.samples == {"train": 9}
    assert found.acceptance_length == {"candidate": 2.25}
    assert found.published == {"stable": 1}


def test_metrics_of_a_process_that_did_nothing_yet_are_zeros() -> None:
    registry = CollectorRegistry()
    InferenceMetrics(registry)
    found = serving(parse(generate_latest(registry).decode()))
    assert (found.output_tokens, found.acceptance_length, found.capture_dropped) == (0, {}, {})


def test_acceptance_is_tokens_a_step_and_rates_by_position() -> None:
    traffic = [
        pb.VersionTraffic(
            version=2,
            verify_steps=10,
            tokens=17,
            proposed=17,
            proposed_by_position=[10, 4, 3],
            accepted_by_position=[5, 2],
        )
    ]
    found = acceptance_of(2, traffic)
    assert found is not None
    assert found.length == 1.7
    assert found.by_position == (0.5, 0.5, 0.0), "of what was proposed there, not of all steps"
    assert found.by_lookahead == (0.0, 0.6, 0.1, 0.3), "of all steps: none has no draft token, six have one"
    assert acceptance_of(1, traffic) is None


@pytest.mark.parametrize("proposed", [[], [50, 80], [101, 80]])
def test_counts_that_are_not_of_one_series_of_steps_have_no_lookaheads(proposed: list[int]) -> None:
    counted = pb.VersionTraffic(version=2, verify_steps=100, tokens=200, proposed_by_position=proposed)
    found = acceptance_of(2, [counted])
    assert found is not None
    assert found.by_lookahead == ()


def test_times_that_no_calendar_has_are_shown_as_its_last() -> None:
    state = pb.SpeculatorState(
        learning=pb.Learning(last_save_unix_ms=2**62, shifts=[pb.TrafficShift(unix_ms=-(2**62))])
    )
    found = speculator(state)
    assert found.pace is not None
    assert found.pace.last_save is not None
    assert found.pace.last_save.year == 9999
    assert found.learning is not None
    assert found.learning.shifts[0].time.year == 1970


def test_a_version_without_a_verify_step_has_no_acceptance() -> None:
    assert acceptance_of(2, [pb.VersionTraffic(version=2)]) is None


def test_a_speculator_comes_with_the_phase_of_each_served_version() -> None:
    state = pb.SpeculatorState(
        speculator="default",
        stable=2,
        pinned=0,
        traffic=[
            pb.VersionTraffic(version=2, verify_steps=1, tokens=2),
            pb.VersionTraffic(version=0, verify_steps=1, tokens=1),
        ],
    )
    found = speculator(state, [pb.Version(version=2, phase=pb.PHASE_STABLE)])
    assert found.pinned == 0
    assert [(row.version, row.phase) for row in found.traffic] == [(2, "stable"), (0, "no draft")]


def test_domains_are_those_of_the_stable_version_and_the_candidate_the_largest_first() -> None:
    sql, chat = (
        pb.DomainTraffic(domain=name, verify_steps=10, tokens=tokens) for name, tokens in [("sql", 20), ("chat", 15)]
    )
    idle = pb.DomainTraffic(domain="idle")
    found = speculator(
        pb.SpeculatorState(
            stable=2,
            candidate=3,
            traffic=[
                pb.VersionTraffic(version=3, domains=[chat, idle]),
                pb.VersionTraffic(version=2, domains=[sql]),
                pb.VersionTraffic(version=1, domains=[sql, chat]),
                pb.VersionTraffic(version=0, domains=[chat]),
            ],
        )
    )
    assert [(one.domain, one.stable, one.candidate) for one in found.domains] == [
        ("sql", 2.0, None),
        ("chat", None, 1.5),
    ]


def test_phases_are_words() -> None:
    assert phase(pb.PHASE_ROLLED_BACK) == "rolled back"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s ago"), (59, "59 s ago"), (60, "1 min ago"), (7200, "2 h ago"), (180_000, "2 d ago")]
)
def test_times_are_shown_in_their_largest_unit(seconds: int, said: str) -> None:
    now = datetime(2026, 11, 24, tzinfo=UTC)
    assert output.ago(now - timedelta(seconds=seconds), now) == said
