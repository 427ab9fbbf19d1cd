"""Lives of a trainer of one or two ranks, one of which ends by SIGKILL at a chosen step:
`python -m tests.support.dying_trainer TARGET`.

The loop, both sides of the commands, intake, replay, states and the saver are the trainer's own; there is no registry, and the
stream and the learner are made up (tests.support.lives). Rank N of R has the traces whose number is N modulo R. A rank that is
left ends by itself, or soon by SIGKILL as from torchrun.

Steps are those of the functions in these modules, in any thread (tests.support.reaper).

Reads one life per line of stdin, and answers with the number of steps of each rank, or null for a life that ended early.
"""

import asyncio
import json
import logging
import os
import random
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from prometheus_client import CollectorRegistry
from tests.support import lives
from tests.support.clock import ManualClock
from tests.support.lives import MAX_USES, AllUsed, FileStream, Life, Spec, UseLearner, names_of
from tests.support.ports import free_port
from tests.support.reaper import Reaper
from tests.support.states import IDENTITY
from tests.support.traces import TraceMaker
from torch.distributed.checkpoint import filesystem, hf_storage

from updraft_artifacts.sizing import usual
from updraft_chassis import durable
from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import Unavailable
from updraft_chassis.lifecycle import Stop
from updraft_chassis.streams.consumer import Consumer
from updraft_trainer import commands, following, loop, saving
from updraft_trainer.commands import CommandChannel
from updraft_trainer.components import Components, TrainingOptions
from updraft_trainer.coordination import ranks as coordination
from updraft_trainer.coordination.ranks import Ranks, joined
from updraft_trainer.coordination.watch import Watch
from updraft_trainer.data import intake, replay, segments
from updraft_trainer.data.capacity import Capacity
from updraft_trainer.data.demand import DemandMeter
from updraft_trainer.data.intake import Intake
from updraft_trainer.data.replay import Replay
from updraft_trainer.following import Follower, Followers, StepOptions
from updraft_trainer.initial_state import InitialState, TrainerSpec, resume
from updraft_trainer.learning.compute import Compute
from updraft_trainer.loop import Trainer
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.decision import PublishThresholds
from updraft_trainer.publishing.evaluator import Evaluator, Judge
from updraft_trainer.publishing.monitor import Monitor
from updraft_trainer.publishing.publish import Publisher
from updraft_trainer.publishing.record import LearningRecord
from updraft_trainer.publishing.registry_view import RegistryView
from updraft_trainer.publishing.schedule import TrainingSchedule
from updraft_trainer.publishing.throughput import Throughput
from updraft_trainer.states import newest_state, saved_values, state
from updraft_trainer.states.newest_state import load_newest
from updraft_trainer.states.state import States, TrainingHistory

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

_MODULES = (
    sys.modules[__name__],
    commands,
    coordination,
    durable,
    filesystem,
    following,
    hf_storage,
    intake,
    lives,
    loop,
    newest_state,
    replay,
    saved_values,
    saving,
    segments,
    state,
)
_FILES = {module.__file__ for module in _MODULES}

_OPTIONS = TrainingOptions(
    batch_tokens=None,
    max_uses=MAX_USES,
    schedule=TrainingSchedule(evaluate_steps=1, evaluate_seconds=1.0, checkpoint_seconds=4.0),
    thresholds=PublishThresholds(min_samples=2, min_gain_percent=1.0, min_first_gain_percent=15.0, confidence=0.9),
)
"""In the time of a clock that advances by a second for each training step."""

_GRACE_S = 5.0
"""torchrun's own is longer."""

_LONGEST_S = 120
"""A life takes a second."""


@dataclass(frozen=True)
class Rank:
    """The parts of one rank of a life."""

    ranks: Ranks
    life: Life
    replay: Replay
    spec: TrainerSpec
    stream: FileStream
    intake: Intake
    metrics: Metrics
    clock: ManualClock

    @property
    def folder(self) -> Path:
        return self.life.folders[self.ranks.rank]

    @property
    def states(self) -> States:
        return States(self.folder / "states")

    @property
    def demand(self) -> DemandMeter:
        return DemandMeter(self.replay, self.life.limits, num_held_out=1, max_uses=MAX_USES)

    async def live(self) -> None:
        """Store all traces, and train until they are used up."""
        channel = CommandChannel(self.ranks, torch.device("cpu"))
        state = load_newest(self.states, IDENTITY, self.ranks)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._take_in())
            if self.ranks.leads:
                new = InitialState(
                    learner=self.spec.learner(torch.arange(1)), history=TrainingHistory(), rng=random.Random(0)
                )
                trainer = self._trainer(new if state is None else resume(state, self.spec), channel)
                tasks.create_task(trainer.run(AllUsed(self.life)))
            else:
                tasks.create_task(self._follower(channel).run(Stop()))

    async def _take_in(self) -> None:
        while self.stream.num_left:  # and no longer: steps of idle turns would be most of all
            await self.intake.store_batch()
            await asyncio.sleep(0.001)

    def _trainer(self, initial: InitialState, channel: CommandChannel) -> Trainer:
        sizes = usual()
        capacity = Capacity.of(1 << 20, sizes, volume_bytes=sizes.trainer_volume.amount)
        record = LearningRecord(
            self.replay, capacity, min_samples=1, version_bytes=1, stream_bytes=1, samples_to_start=0
        )
        registry = RegistryView(
            cast("RegistryAsyncStub", None), "default", self.folder / "drafts", self.metrics, learning=record.read
        )
        components = Components(
            replay=self.replay,
            registry=registry,
            evaluator=cast("Evaluator", None),
            publisher=cast("Publisher", None),
            states=self.states,
            record=record,
            monitor=Monitor(self.metrics, Throughput(), self.clock),
            demand=self.demand,
            metrics=self.metrics,
            clock=self.clock,
            check=lambda: None,
            folder_ids=[_folder_id(rank) for rank in range(self.ranks.size)],
            followers=Followers(self.ranks, channel if self.ranks.size > 1 else None),
        )
        return Trainer(initial, components, _OPTIONS, identity=IDENTITY, spec=self.spec)

    def _follower(self, channel: CommandChannel) -> Follower:
        return Follower(
            self.ranks,
            channel,
            self.spec,
            self.replay,
            Judge(self.replay, num_samples=1, lookahead=1),
            StepOptions(batch_tokens=None, max_uses=MAX_USES, num_waiting=1),
            folder_id=_folder_id(self.ranks.rank),
            demand=self.demand,
            metrics=self.metrics,
            clock=self.clock,
            watch=Watch(self.clock),
        )


def _folder_id(rank: int) -> str:
    return f"folder {rank}"


async def live(life: Life, ranks: Ranks, maker: TraceMaker) -> None:
    """One rank's, until there is nothing left to do."""
    folder, clock, metrics = life.folders[ranks.rank], ManualClock(), Metrics(CollectorRegistry())
    names = names_of(maker, life.num_traces)
    stream = FileStream(folder, range(ranks.rank, life.num_traces, ranks.size), maker)
    spec = Spec(lambda: UseLearner(ranks, names, clock), Compute(ranks=ranks))
    with Replay.open(folder / "replay", limits=life.limits, expected=maker.expected, cache_bytes=0) as stored:
        rank = Rank(
            ranks=ranks,
            life=life,
            replay=stored,
            spec=cast("TrainerSpec", spec),
            stream=stream,
            intake=Intake(cast("Consumer", stream), stored, maker.expected, metrics=metrics, clock=SystemClock()),
            metrics=metrics,
            clock=clock,
        )
        await rank.live()


def _live(life: Life, rank: int, port: int, maker: TraceMaker) -> int:
    """One rank in this process; returns its number of steps."""
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": life.num_ranks,
        "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1",
    }
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
        life.folders[rank].mkdir(exist_ok=True)
        try:
            os.write(write, str(_live(life, rank, port, maker)).encode())
        except* Unavailable:
            if not life.fatal_step:  # no other rank was killed
                raise
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


def _run(life: Life, maker: TraceMaker) -> list[int] | None:
    """Steps of the ranks; None if one was killed."""
    port = free_port()
    children = [_fork(life, rank, port, maker) for rank in range(life.num_ranks)]
    left = {child for child, _ in children}
    while left:
        child, status = os.wait()
        left.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a rank ended with {code}")
        if code:
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


def main() -> None:
    """Run a life for each line of stdin, and answer each with a line."""
    torch.set_num_threads(1)  # a process with threads must not fork
    logging.disable()
    maker = TraceMaker(Path(sys.argv[1]))
    _say("ready")
    for line in sys.stdin:
        _say(_run(Life(**json.loads(line)), maker))


def _say(value: object) -> None:
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
