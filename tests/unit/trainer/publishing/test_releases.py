"""Of several candidates at most one is published, and one sentence says why, or why not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from tests.support.clock import ManualClock
from tests.support.states import IDENTITY
from tests.support.tiny_target import make_draft
from tests.support.traces import TraceMaker

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts.sizing import usual
from updraft_rollouts.evidence import Paired
from updraft_trainer.data.capacity import Capacity
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import ReplayLimits
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.decision import PublishThresholds
from updraft_trainer.publishing.estimate import GainEstimate
from updraft_trainer.publishing.monitor import Monitor
from updraft_trainer.publishing.publish import Candidate, Publisher
from updraft_trainer.publishing.record import LearningRecord
from updraft_trainer.publishing.registry_view import RegistryView, RolloutState
from updraft_trainer.publishing.releases import Releases
from updraft_trainer.publishing.report import TrainingReport
from updraft_trainer.publishing.schedule import PublishBackoff
from updraft_trainer.publishing.throughput import Throughput

FREE = RolloutState(
    stable=1, candidate=0, start_version=1, is_unloadable=False, hold_reason="", target_fingerprint="sha256:t"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    releases: Releases
    sentences: list[str]
    metrics: Metrics

    @property
    def num_withheld(self) -> float | None:
        return self.metrics.registry.get_sample_value("updraft_trainer_publishes_total", {"outcome": "withheld"})

    @property
    def length(self) -> float | None:
        """Acceptance length of the candidate that the metrics show."""
        return self.metrics.registry.get_sample_value("updraft_trainer_acceptance_length_tokens", {"role": "candidate"})


@pytest.fixture
def desk(tmp_path: Path, tiny_target: Path) -> Iterator[Desk]:
    metrics, clock, sentences = Metrics(CollectorRegistry()), ManualClock(), list[str]()
    offline: Any = None  # a decision asks nobody
    limits, sizes, expected = ReplayLimits.of(1 << 20), usual(), TraceMaker(tiny_target).expected
    with Replay.open(tmp_path / "replay", limits=limits, expected=expected, cache_bytes=1 << 20) as replay:
        record = LearningRecord(
            replay,
            Capacity.of(1 << 20, sizes, volume_bytes=sizes.trainer_volume.amount),
            min_samples=8,
            version_bytes=sizes.version.amount,
            stream_bytes=2**28,
            samples_to_start=8,
        )
        yield Desk(
            releases=Releases(
                publisher=Publisher(offline, identity=IDENTITY, config_digest="sha256:c", folder=tmp_path, clock=clock),
                registry=RegistryView(offline, "default", tmp_path, metrics, learning=pb.Learning),
                thresholds=PublishThresholds(
                    min_samples=8, min_gain_percent=1.0, min_first_gain_percent=15.0, confidence=0.9
                ),
                backoff=PublishBackoff(15.0),
                report=TrainingReport(sentences.append),
                record=record,
                monitor=Monitor(metrics, Throughput(), clock),
                metrics=metrics,
                clock=clock,
            ),
            sentences=sentences,
            metrics=metrics,
        )


@pytest.fixture
def worse(tiny_target: Path) -> Candidate:
    """A candidate that needs 11 steps where the draft that serves needs 10."""
    pairs = (Paired(tokens=22, candidate_steps=11, baseline_steps=10),) * 8
    return Candidate(
        network=make_draft(tiny_target, token_ids=torch.arange(64)),
        step=7,
        estimate=GainEstimate(trace_ids=tuple(map(str, range(8))), domains=("",) * 8, pairs=pairs),
        baseline_version=1,
        lookahead=3,
    )


def with_steps(one: Candidate, steps: int) -> Candidate:
    pairs = tuple(replace(pair, candidate_steps=steps) for pair in one.estimate.pairs)
    return replace(one, estimate=replace(one.estimate, pairs=pairs))


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [
        pytest.param({"first": 9, "second": 8}, "first", id="both are good enough"),
        pytest.param({"first": 11, "second": 8}, "second", id="the second alone is"),
        pytest.param({"first": 9, "second": 11}, "first", id="the first alone is"),
    ],
)
def test_of_candidates_in_the_order_of_preference_the_first_that_is_good_enough_is_published(
    desk: Desk, worse: Candidate, steps: dict[str, int], chosen: str
) -> None:
    candidates = {name: with_steps(worse, num) for name, num in steps.items()}
    assert desk.releases.first_due(candidates, FREE) is candidates[chosen]
    (sentence,) = desk.sentences
    assert sentence.startswith(f"{chosen} is ")
    assert sentence.partition(" (")[0].endswith(" % better than version 1 for today's traffic")
    assert desk.length == pytest.approx(22 / steps[chosen]), "that of the same candidate"


def test_if_no_candidate_is_good_enough_the_sentence_is_about_the_preferred_one(desk: Desk, worse: Candidate) -> None:
    assert desk.releases.first_due({"first": with_steps(worse, 12), "second": worse}, FREE) is None
    (sentence,) = desk.sentences
    assert sentence.startswith("first is 16.7 % worse than version 1 ")


def test_of_two_candidates_that_are_good_enough_one_is_withheld(desk: Desk, worse: Candidate) -> None:
    good, held = with_steps(worse, 9), replace(FREE, hold_reason="version 1 is pinned")
    assert desk.releases.first_due({"first": good, "second": good}, held) is None
    assert desk.num_withheld == 1.0
    (sentence,) = desk.sentences
    assert sentence.startswith("first is ")
    assert sentence.endswith("it is not published because version 1 is pinned")
