"""A rank that follows counts what its own samples have taught the draft, also when it was away for a while."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from tests.support.clock import ManualClock
from tests.support.states import IDENTITY
from tests.support.traces import TraceMaker

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_chassis.lifecycle import Stop
from updraft_draft import checkpoint
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import read_head
from updraft_trainer.commands import Command, CommandChannel, DraftTensors, EndFit, Estimate, LoadLearner, ShareFitted
from updraft_trainer.coordination.ranks import ALONE
from updraft_trainer.coordination.watch import Watch
from updraft_trainer.data.demand import DemandMeter
from updraft_trainer.data.replay import IncomingTrace, Replay
from updraft_trainer.data.retention import ReplayLimits
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.following import Follower, StepOptions
from updraft_trainer.initial_state import TrainerSpec, resume
from updraft_trainer.learning.learner import Hyperparameters
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.estimate import Evidence
from updraft_trainer.publishing.evaluator import Judge
from updraft_trainer.states.state import State, States, TrainingHistory


class Commands(CommandChannel):
    """Sends these commands, one after the other."""

    def __init__(self, *commands: Command) -> None:
        self._commands = iter(commands)

    def receive(self) -> Command:
        return next(self._commands)


class NotingJudge(Judge):
    """Notes which requests judge each candidate beside the held-out ones."""

    def __init__(self, replay: Replay) -> None:
        super().__init__(replay, num_samples=4, lookahead=3)
        self.judged_by: list[list[str]] = []

    def evidence(self, candidate: DraftNetwork, unseen: Sequence[Sample] = ()) -> Evidence:
        self.judged_by.append([sample.trace_id for sample in unseen])
        return super().evidence(candidate, unseen)


def spec_of(target: Path) -> TrainerSpec:
    return TrainerSpec(
        target=read_head(target),
        target_fingerprint="sha256:t",
        hyper=Hyperparameters(),
        shape=ShapeChoice(draft_vocab_size=64),
        first_samples=1,
        seed=0,
    )


@contextmanager
def stored(target: Path, folder: Path, num_traces: int) -> Iterator[Replay]:
    """By an earlier process."""
    maker, limits = TraceMaker(target), ReplayLimits.of(1 << 20)
    for seeds in range(num_traces), ():
        with Replay.open(folder, limits=limits, expected=maker.expected, cache_bytes=1 << 20) as replay:
            for seed in seeds:
                admit(replay, maker, seed)
            if not seeds:
                yield replay


def admit(replay: Replay, maker: TraceMaker, seed: int) -> None:
    data = maker.data(seed)
    replay.admit([IncomingTrace(sample=read_sample(data, maker.expected), data=data)])


def follower(
    spec: TrainerSpec, replay: Replay, *commands: Command, folder_id: str = "own", judge: Judge | None = None
) -> Follower:
    clock = ManualClock()
    return Follower(
        ALONE,
        Commands(*commands),
        spec,
        replay,
        judge or NotingJudge(replay),
        StepOptions(batch_tokens=None, max_uses=4, num_waiting=2),
        folder_id=folder_id,
        demand=DemandMeter(replay, ReplayLimits.of(1 << 20), num_held_out=4, max_uses=4),
        metrics=Metrics(CollectorRegistry()),
        clock=clock,
        watch=Watch(clock),
    )


@pytest.mark.parametrize(
    ("folder_id", "is_counted"),
    [pytest.param("was-there", True, id="it was there"), pytest.param("was-away", False, id="it was away")],
)
def test_a_rank_that_was_away_when_the_state_was_saved_counts_all_that_it_stored_before_as_used(
    tiny_target: Path, tmp_path: Path, folder_id: str, *, is_counted: bool
) -> None:
    spec = spec_of(tiny_target)
    with stored(tiny_target, tmp_path / "replay", 3) as replay:
        first, *others = replay.training_ids()
        admit(replay, TraceMaker(tiny_target), 3)  # since the start: no draft has learned from it
        learner = spec.learner(torch.arange(64))
        state = State(
            identity=IDENTITY,
            token_ids=learner.network.token_ids,
            learner=learner.state_dict(),
            history=TrainingHistory(uses={first: 3, "elsewhere": 1}, folders=["leads", "was-there"]),
            rng=random.Random(0).getstate(),
            config_digest=spec.config_digest,
            draft_config=learner.network.config,
            taken_s=0.0,
        )
        States(tmp_path / "states").save(state)
        saved = States(tmp_path / "states").load(IDENTITY)
        assert saved is not None
        initial = resume(saved, spec)
        command = LoadLearner(
            config=initial.learner.network.config,
            token_ids=initial.learner.network.token_ids,
            learner=initial.learner.state_dict(),
            uses=initial.history.uses,
            counted=initial.counted,
        )
        rank = follower(spec, replay, command, folder_id=folder_id)
        assert rank.obey(Stop())
        assert rank.history.uses == {first: 3} | ({} if is_counted else dict.fromkeys(others, 1))


@pytest.mark.parametrize(
    ("is_used", "num_judges_after"),
    [pytest.param(False, 2, id="a fit without a use"), pytest.param(True, 1, id="a fit that is used")],
)
def test_samples_of_a_fit_judge_again_after_it_unless_its_draft_is_used(
    tiny_target: Path, tmp_path: Path, num_judges_after: int, *, is_used: bool
) -> None:
    spec = spec_of(tiny_target)
    with stored(tiny_target, tmp_path / "replay", 3) as replay:
        *fitted, newest = replay.training_ids()
        learner = spec.learner(torch.arange(64))
        config, tensors = learner.network.config, checkpoint.checkpoint_tensors(learner.network)
        load = LoadLearner(
            config=config, token_ids=torch.arange(64), learner=learner.state_dict(), uses={}, counted=None
        )
        estimate = Estimate(DraftTensors(config=config, tensors=dict(tensors)))
        judge = NotingJudge(replay)
        commands = (load, ShareFitted(), estimate, EndFit(is_used), estimate)
        rank = follower(spec, replay, *commands, judge=judge)
        assert all(rank.obey(Stop()) for _ in commands)
        during, after = judge.judged_by
        assert during == [newest]
        assert after == [newest, fitted[-1]][:num_judges_after]
        assert rank.history.uses == (dict.fromkeys(fitted, 1) if is_used else {})
