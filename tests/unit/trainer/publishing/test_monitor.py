"""The phases of a loop's turn, and its tokens, are in the metrics and in the throughput."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from tests.support.clock import ManualClock
from tests.support.disk import file_size_limit
from tests.support.tiny_target import DRAFT_VOCAB, make_tiny_target
from tests.support.traces import TraceMaker

from updraft_draft.target_weights import read_head
from updraft_draft.tensors import EncodedRows
from updraft_rollouts.evidence import Gain
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.curves import Curves
from updraft_trainer.publishing.monitor import Monitor
from updraft_trainer.publishing.throughput import Throughput


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture
def learner(target: Path) -> Learner:
    head = read_head(target)
    return Learner(head, head.draft(draft_vocab_size=DRAFT_VOCAB), torch.arange(DRAFT_VOCAB), Hyperparameters())


@pytest.fixture
def samples(target: Path) -> list[Sample]:
    maker = TraceMaker(target)
    return [read_sample(maker.data(seed), maker.expected) for seed in range(4)]


def _value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"updraft_trainer_{name}", labels)


def test_a_turn_of_the_loop_is_split_by_phase(learner: Learner, samples: list[Sample]) -> None:
    metrics, throughput, clock = Metrics(CollectorRegistry()), Throughput(device="cpu (1 thread)"), ManualClock()
    clock.advance(1000.0)
    monitor = Monitor(metrics, throughput, clock)
    clock.advance(50.0)
    monitor.begin()
    with monitor.phase("estimate"):
        clock.advance(6.0)
    report = learner.train(samples)
    clock.advance(2.0)
    monitor.stepped(learner, report, num_steps=1, duration_s=2.0)
    monitor.turn(learner)
    assert _value(metrics, "phase_seconds_total", phase="estimate") == 6.0
    for phase in ("data", "forward", "backward", "optimizer"):
        assert (_value(metrics, "phase_seconds_total", phase=phase) or 0.0) > 0.0
    assert _value(metrics, "trained_rows_total") == report.num_rows
    assert throughput.tokens_per_s == pytest.approx(report.num_rows / 8.0)
    assert throughput.shares["estimate"] == pytest.approx(0.75)
    monitor.turn(learner)
    assert _value(metrics, "phase_seconds_total", phase="estimate") == 6.0, "nothing is counted twice"
    assert throughput.total is not None
    assert throughput.total.tokens == report.num_rows


def test_the_learning_rate_is_that_of_the_last_step(learner: Learner, samples: list[Sample]) -> None:
    metrics, throughput, clock = Metrics(CollectorRegistry()), Throughput(), ManualClock()
    monitor = Monitor(metrics, throughput, clock)
    monitor.stepped(learner, learner.train(samples), num_steps=1, duration_s=1.0)
    assert _value(metrics, "learning_rate") == pytest.approx(learner.hyper.learning_rate / learner.hyper.warmup_steps)


def test_a_step_that_changes_nothing_counts_as_no_training_and_has_no_loss(
    learner: Learner, samples: list[Sample], tmp_path: Path
) -> None:
    metrics, throughput, clock = Metrics(CollectorRegistry()), Throughput(), ManualClock()
    monitor = Monitor(metrics, throughput, clock, curves=Curves(tmp_path, clock))
    report = learner.train(samples)
    monitor.stepped(learner, report, num_steps=1, duration_s=1.0)
    before = [file.read_bytes() for file in tmp_path.iterdir()]
    clock.advance(60.0)
    bad = learner.train(
        [replace(samples[0], aux=EncodedRows.of(torch.full_like(samples[0].aux.decoded(), float("nan"))))]
    )
    assert bad.is_skipped
    monitor.stepped(learner, bad, num_steps=0, duration_s=1.0)
    monitor.stepped(learner, learner.train([]), num_steps=0, duration_s=1.0)
    monitor.turn(learner)
    assert _value(metrics, "optimizer_steps_skipped_total") == 1.0
    assert _value(metrics, "step_seconds_count") == 3.0
    assert _value(metrics, "loss") == pytest.approx(report.loss)
    assert _value(metrics, "trained_rows_total") == report.num_rows
    assert throughput.total is not None
    assert throughput.total.tokens == report.num_rows
    assert [file.read_bytes() for file in tmp_path.iterdir()] == before


def test_what_a_cpu_does_not_have_is_absent_and_not_zero() -> None:
    metrics = Metrics(CollectorRegistry())
    Monitor(metrics, Throughput(device="cpu (2 threads)"), ManualClock())
    text = generate_latest(metrics.registry).decode()
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert not [line for line in samples if "gpu_memory" in line or "flops_utilization" in line]
    assert 'updraft_trainer_ranks{device="cpu (2 threads)"} 1.0' in samples


def test_a_device_with_a_peak_has_a_utilization(learner: Learner, samples: list[Sample]) -> None:
    metrics, throughput, clock = Metrics(CollectorRegistry()), Throughput(device="a GPU", peak_flops=1e9), ManualClock()
    monitor = Monitor(metrics, throughput, clock)
    report = learner.train(samples)
    clock.advance(2.0)
    flops = learner.times.flops
    monitor.stepped(learner, report, num_steps=1, duration_s=2.0)
    monitor.turn(learner)
    assert flops > 0
    assert _value(metrics, "flops_utilization_ratio", device="a GPU") == pytest.approx(flops / 2.0 / 1e9)


def test_points_of_curves_are_written_every_few_seconds_and_lost_ones_are_counted(
    learner: Learner, samples: list[Sample], tmp_path: Path
) -> None:
    metrics, throughput, clock = Metrics(CollectorRegistry()), Throughput(), ManualClock()
    monitor = Monitor(metrics, throughput, clock, curves=Curves(tmp_path, clock))
    monitor.estimated(Gain(candidate=2.5, baseline=2.0, percent=25.0, low_percent=20.0, high_percent=30.0))

    def written(seconds: float) -> bytes:
        clock.advance(seconds)
        monitor.stepped(learner, learner.train(samples), num_steps=1, duration_s=1.0)
        monitor.turn(learner)
        return b"".join(file.read_bytes() for file in tmp_path.iterdir())

    first = written(0.0)
    assert all(tag in first for tag in (b"train/loss", b"train/grad_norm", b"train/learning_rate"))
    assert b"acceptance_length/baseline" in first
    assert written(1.0) == first
    assert b"time/forward" in written(5.0)
    with file_size_limit(4):
        written(5.0)
    assert _value(metrics, "lost_curve_points_total") == 1.0
    assert _value(metrics, "acceptance_length_tokens", role="candidate") == 2.5
