"""Lives of a trainer of two ranks, one of which ends by SIGKILL at a chosen step: `python -m tests.support.dying_ranks TARGET`.

Streams and weights are made up as in `dying_trainer`; intake, replay, states, the saver, both sides of the commands and the
loop's steps are the trainer's own. Rank N has the traces whose number is N modulo 2. A rank that is left ends by itself, or
soon by SIGKILL as from torchrun.
"""

import asyncio
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from prometheus_client import CollectorRegistry
from tests.support.clock import ManualClock
from tests.support.dying_trainer import FILES as OTHER_FILES
from tests.support.dying_trainer import MAX_USES, SCHEDULE, FileStream, Life, acked, answer
from tests.support.ports import free_port
from tests.support.reaper import Reaper
from tests.support.states import DRAFT, IDENTITY
from tests.support.traces import TraceMaker
from torch import Tensor

from updraft_artifacts.sizing import usual
from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import Unavailable
from updraft_chassis.lifecycle import Stop
from updraft_chassis.streams import Consumer
from updraft_draft.config import DraftConfig
from updraft_trainer import commands, following, loop
from updraft_trainer.commands import CommandChannel
from updraft_trainer.components import Components, TrainingOptions
from updraft_trainer.coordination.ranks import Ranks, joined
from updraft_trainer.coordination.watch import Watch
from updraft_trainer.data.capacity import Capacity
from updraft_trainer.data.demand import DemandMeter
from updraft_trainer.data.intake import Intake
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.sample import Sample
from updraft_trainer.following import Follower, Followers, StepOptions
from updraft_trainer.initial_state import InitialState, TrainerSpec, resume
from updraft_trainer.learning.compute import Compute
from updraft_trainer.learning.gradients import StepReport
from updraft_trainer.learning.learner import Learner
from updraft_trainer.learning.step_time import StepTimes
from updraft_trainer.loop import Trainer
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.decision import PublishThresholds
from updraft_trainer.publishing.evaluator import Evaluator, Judge
from updraft_trainer.publishing.monitor import Monitor
from updraft_trainer.publishing.publish import Publisher
from updraft_trainer.publishing.record import LearningRecord
from updraft_trainer.publishing.registry_view import RegistryView
from updraft_trainer.publishing.throughput import Throughput
from updraft_trainer.states.newest_state import load_newest
from updraft_trainer.states.state import States, TrainingHistory

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

SIZE = 2

_FILES = {*OTHER_FILES, __file__, commands.__file__, following.__file__, loop.__file__}

_GRACE_S = 5.0
"""torchrun's own is longer."""

_LONGEST_S = 120
"""A life takes a second."""

_THRESHOLDS = PublishThresholds(min_samples=SIZE, min_gain_percent=1.0, min_first_gain_percent=15.0, confidence=0.9)


def rank_life(life: Life, rank: int) -> Life:
    """What `dying_trainer` knows of one rank: its own folder and file of acknowledged traces."""
    return replace(life, folder=str(life.path / f"rank-{rank}"))


@dataclass(frozen=True)
class Network:
    """What commands and states say of a draft."""

    config: DraftConfig
    token_ids: Tensor


class UseLearner:
    """Its weights are the numbers of the traces that all ranks have trained it on, in their order."""

    step_rate = 0.0
    is_cold = False

    def __init__(self, ranks: Ranks, numbers: dict[str, int], clock: ManualClock) -> None:
        self._ranks = ranks
        self._numbers = numbers
        self._clock = clock
        self.network = Network(DRAFT, torch.arange(DRAFT.draft_vocab_size))
        self.times = StepTimes()
        self.trail: list[int] = []
        self.step = 0

    def warm_up(self) -> float:
        return 0.0

    def train(self, samples: list[Sample]) -> StepReport:
        own = [self._numbers[sample.trace_id] for sample in samples]
        self.trail += [number for part in self._ranks.broadcast_object(self._ranks.gather(own)) for number in part]
        self.step += 1
        self._clock.advance(1.0)
        return StepReport(loss=0.0, grad_norm=0.0, num_rows=len(samples))

    def collect(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"trail": torch.tensor(self.trail, dtype=torch.int64), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trail, self.step = state["trail"].tolist(), int(state["step"])


@dataclass(frozen=True)
class Spec:
    """Makes such learners."""

    make: Callable[[], UseLearner]
    compute: Compute = field(default_factory=Compute)
    config_digest: str = "sha256:c"
    seed: int = 0

    def learner(self, token_ids: Tensor, config: DraftConfig | None = None) -> Learner:
        return cast("Learner", self.make())


@dataclass(frozen=True)
class Rank:
    """What one rank of a life has."""

    ranks: Ranks
    life: Life
    """Of both."""
    replay: Replay
    spec: TrainerSpec
    stream: FileStream
    intake: Intake
    demand: DemandMeter
    metrics: Metrics
    clock: ManualClock
    channel: CommandChannel

    @property
    def num_acked(self) -> int:
        """At both."""
        return sum(len(acked(rank_life(self.life, rank).path)) for rank in range(SIZE))

    def trainer(self, folder_ids: list[str]) -> Trainer:
        own, sizes = rank_life(self.life, 0).path, usual()
        states = States(own / "states")
        state = load_newest(states, IDENTITY, self.ranks)
        new = InitialState(learner=self.spec.learner(torch.arange(1)), history=TrainingHistory(), rng=random.Random(0))
        capacity = Capacity.of(1 << 20, sizes, volume_bytes=sizes.trainer_volume.amount)
        record = LearningRecord(
            self.replay, capacity, min_samples=1, version_bytes=1, stream_bytes=1, samples_to_start=0
        )
        registry = RegistryView(
            cast("RegistryAsyncStub", None), "default", own / "drafts", self.metrics, learning=record.read
        )
        components = Components(
            replay=self.replay,
            registry=registry,
            evaluator=cast("Evaluator", None),
            publisher=cast("Publisher", None),
            states=states,
            record=record,
            monitor=Monitor(self.metrics, Throughput(), self.clock),
            demand=self.demand,
            metrics=self.metrics,
            clock=self.clock,
            check=lambda: None,
            folder_ids=folder_ids,
            followers=Followers(self.ranks, self.channel),
        )
        options = TrainingOptions(batch_tokens=None, max_uses=MAX_USES, schedule=SCHEDULE, thresholds=_THRESHOLDS)
        initial = new if state is None else resume(state, self.spec)
        return Trainer(initial, components, options, identity=IDENTITY, spec=self.spec)

    async def lead(self, folder_ids: list[str]) -> None:
        """As `Trainer.run`, without the registry, until both ranks have stored all traces and used them up."""
        trainer = self.trainer(folder_ids)
        followers = trainer._components.followers
        counted = trainer._counted
        await asyncio.to_thread(followers.load_learner, trainer.learner, uses=trainer.history.uses, counted=counted)
        is_busy = True
        while is_busy:
            was_settled = self.num_acked == self.life.num_traces
            await self.intake.store_batch()
            has_trained = await asyncio.to_thread(trainer.train)
            await trainer.saver.save_if_due(step_s=1.0)
            is_busy = has_trained or not was_settled
        await trainer.saver.save()
        await asyncio.to_thread(followers.end)

    async def follow(self, folder_id: str) -> None:
        stop, num_traces = Stop(), len(self.stream.waiting)
        load_newest(States(rank_life(self.life, 1).path / "states"), IDENTITY, self.ranks)
        follower = Follower(
            self.ranks,
            self.channel,
            self.spec,
            self.replay,
            Judge(self.replay, num_samples=1, lookahead=1),
            StepOptions(batch_tokens=None, max_uses=MAX_USES, num_waiting=1),
            folder_id=folder_id,
            demand=self.demand,
            metrics=self.metrics,
            clock=self.clock,
            watch=Watch(self.clock),
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(follower.run(stop))
            while self.stream.num_acked < num_traces:  # and no longer: steps of idle turns would be most of all
                await self.intake.store_batch()
                await asyncio.sleep(0.001)


async def live(life: Life, ranks: Ranks, maker: TraceMaker) -> None:
    """One rank's, until there is nothing left to do."""
    own, clock, metrics = rank_life(life, ranks.rank), ManualClock(), Metrics(CollectorRegistry())
    numbers = {maker.trace(n, evaluation=n % 5 == 4).header.trace_id.hex(): n for n in range(life.num_traces)}
    stream = FileStream(own, maker)
    stream.waiting = [one for one in stream.waiting if int(one.id.partition("-")[2]) % SIZE == ranks.rank]
    spec = Spec(lambda: UseLearner(ranks, numbers, clock), Compute(ranks=ranks))
    with Replay.open(own.path / "replay", limits=life.limits, expected=maker.expected, cache_bytes=0) as replay:
        rank = Rank(
            ranks=ranks,
            life=life,
            replay=replay,
            spec=cast("TrainerSpec", spec),
            stream=stream,
            intake=Intake(cast("Consumer", stream), replay, maker.expected, metrics=metrics, clock=SystemClock()),
            demand=DemandMeter(replay, life.limits, num_held_out=1, max_uses=MAX_USES),
            metrics=metrics,
            clock=clock,
            channel=CommandChannel(ranks, torch.device("cpu")),
        )
        folder_ids = [f"folder {number}" for number in range(SIZE)]
        await (rank.lead(folder_ids) if ranks.leads else rank.follow(folder_ids[ranks.rank]))


def _live(life: Life, rank: int, port: int, maker: TraceMaker) -> int:
    """One rank in this process; returns its number of steps."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in variables.items()})
    with joined(os.environ, torch.device("cpu")) as ranks:
        reaper = Reaper(_FILES, life.fatal_step if rank == life.fatal_rank else 0)
        threading.setprofile(reaper)
        sys.setprofile(reaper)
        asyncio.run(live(life, ranks, maker))
        sys.setprofile(None)
    return reaper.num_steps


def _fork(life: Life, rank: int, port: int, maker: TraceMaker) -> tuple[int, int]:
    """The child's id, and where it writes its number of steps."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    try:
        signal.alarm(_LONGEST_S)  # ranks that wait for different things wait for half an hour
        rank_life(life, rank).path.mkdir(exist_ok=True)
        with suppress(*([Unavailable] if life.fatal_step else [])):  # the other one was killed
            os.write(write, str(_live(life, rank, port, maker)).encode())
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


def _run(life: Life, maker: TraceMaker) -> list[int] | None:
    """Steps of both ranks; None if one was killed."""
    port = free_port()
    children = [_fork(life, rank, port, maker) for rank in range(SIZE)]
    left = {child for child, _ in children}
    while left:
        child, status = os.wait()
        left.discard(child)
        if os.waitstatus_to_exitcode(status):
            _end(left)
    texts = []
    for _, read in children:
        with os.fdopen(read) as steps:
            texts.append(steps.read())
    if all(texts):
        return [int(text) for text in texts]
    if not life.fatal_step:
        raise RuntimeError("a life ended early")
    return None


def _end(left: set[int]) -> None:
    """Kill those that do not end by themselves."""
    end_s = time.monotonic() + _GRACE_S
    while left and time.monotonic() < end_s:
        left -= {child for child in left if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(0.01)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    left.clear()


if __name__ == "__main__":
    answer(_run)
