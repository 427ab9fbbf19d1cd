"""Lives of a trainer that ends by SIGKILL at a chosen step: `python -m tests.support.dying_trainer TARGET`.

A life takes traces in, trains and saves with the trainer's own intake, replay, states and saver. Two parts are made up. The
stream is a file of acknowledged entries; what is not in it is delivered again. The learner's only weights are the list of all
uses in their order, so a state shows what its weights have learned.

Steps are those of the functions in these modules, in any thread (tests.support.reaper).

Reads one life per line of stdin, and answers with the number of steps, or null for a life that ended early.
"""

import asyncio
import json
import logging
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
from prometheus_client import CollectorRegistry
from tests.support.clock import ManualClock
from tests.support.reaper import Reaper
from tests.support.states import IDENTITY, make_state
from tests.support.traces import TraceMaker
from torch import Tensor
from torch.distributed.checkpoint import filesystem, hf_storage

from updraft_chassis import durable
from updraft_chassis.clock import SystemClock
from updraft_chassis.streams import Consumer, Entry
from updraft_trainer import saving
from updraft_trainer.coordination import ranks
from updraft_trainer.coordination.ranks import ALONE
from updraft_trainer.data import intake, replay, segments
from updraft_trainer.data.intake import Intake
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import ReplayLimits
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.schedule import Progress, TrainingSchedule
from updraft_trainer.saving import Saver
from updraft_trainer.states import newest_state, saved_values, state
from updraft_trainer.states.newest_state import load_newest
from updraft_trainer.states.state import State, States, TrainingHistory

ACKED = "acked"

MAX_USES = 2

_MODULES = (
    sys.modules[__name__],
    durable,
    filesystem,
    hf_storage,
    intake,
    newest_state,
    ranks,
    replay,
    saved_values,
    saving,
    segments,
    state,
)
FILES = {module.__file__ for module in _MODULES}

SCHEDULE = TrainingSchedule(evaluate_steps=1, evaluate_seconds=1.0, checkpoint_seconds=4.0)
"""In the time of a clock that advances by a second for each training step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """`num_traces` are in the stream, every fifth held out. `fatal_step`: 0 for a life to the end. `fatal_rank`: of several
    (`dying_ranks`)."""

    folder: str
    num_traces: int
    max_bytes: int
    fatal_step: int = 0
    fatal_rank: int = 0

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def limits(self) -> ReplayLimits:
        return ReplayLimits.of(self.max_bytes)


def data_of(maker: TraceMaker, number: int) -> bytes:
    return maker.data(number, evaluation=number % 5 == 4)


def acked(folder: Path) -> list[int]:
    """The numbers of acknowledged traces."""
    path = folder / ACKED
    return [int(line) for line in path.read_text().split()] if path.exists() else []


class FileStream:
    """Delivers each trace once in a life, unless it was acknowledged in an earlier one."""

    def __init__(self, life: Life, maker: TraceMaker) -> None:
        settled = set(acked(life.path))
        now_ms = int(SystemClock().now() * 1000)
        numbers = [number for number in range(life.num_traces) if number not in settled]
        self.waiting = [Entry(id=f"{now_ms}-{n}", data=data_of(maker, n), deliveries=1) for n in numbers]
        self._path = life.path / ACKED
        self.num_acked = 0
        """In this life."""

    async def read(self, *, count: int, block: timedelta) -> list[Entry]:
        entries, self.waiting = self.waiting[:count], self.waiting[count:]
        return entries

    async def ack(self, ids: Iterable[str]) -> None:
        """At once, as Redis does."""
        lines = [f"{id_.partition('-')[2]}\n" for id_ in ids]
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, "".join(lines).encode())
        os.close(file)
        self.num_acked += len(lines)


class UseLearner:
    """Its weights are the numbers of the traces that it was trained on, in their order."""

    def __init__(self, replay: Replay, numbers: dict[str, int], loaded: State | None) -> None:
        self._replay = replay
        self._numbers = numbers
        self._rng = random.Random(0)
        self.history = loaded.history if loaded else TrainingHistory()
        self.trail: list[int] = cast("Tensor", loaded.learner["trail"]).tolist() if loaded else []
        if loaded:
            self._rng.setstate(loaded.rng)

    def train(self) -> bool:
        batch = self._replay.training_batch(self.history.uses, max_uses=MAX_USES, rng=self._rng)
        for sample in batch:
            self.trail.append(self._numbers[sample.trace_id])
        for sample in batch:
            self.history.count_use(sample.trace_id)
        return bool(batch)

    def take(self) -> State:
        stored = set(self._replay.training_ids())
        self.history.uses = {id_: uses for id_, uses in self.history.uses.items() if id_ in stored}
        learner = {"trail": torch.tensor(self.trail, dtype=torch.int64)}
        return replace(make_state(0), learner=learner, history=self.history, rng=self._rng.getstate())


async def live(life: Life, maker: TraceMaker) -> None:
    """Until all traces are stored, and those that may be used are used up."""
    stream, clock, metrics = FileStream(life, maker), ManualClock(), Metrics(CollectorRegistry())
    numbers = {maker.trace(n, evaluation=n % 5 == 4).header.trace_id.hex(): n for n in range(life.num_traces)}
    with Replay.open(life.path / "replay", limits=life.limits, expected=maker.expected, cache_bytes=0) as stored:
        states = States(life.path / "states")
        learner = UseLearner(stored, numbers, load_newest(states, IDENTITY, ALONE))
        saver = Saver(
            states,
            SCHEDULE,
            take=learner.take,
            progress=lambda: Progress(step=len(learner.trail), num_held_out=0, at_s=clock.monotonic()),
            metrics=metrics,
            clock=clock,
        )
        taking = Intake(cast("Consumer", stream), stored, maker.expected, metrics=metrics, clock=SystemClock())
        is_busy = True
        while is_busy:
            num_acked = len(acked(life.path))
            await taking.store_batch()
            has_trained = await asyncio.to_thread(learner.train)
            clock.advance(1.0)
            await saver.save_if_due(step_s=1.0)
            is_busy = has_trained or len(acked(life.path)) > num_acked
        await saver.save()


def _live(life: Life, maker: TraceMaker) -> int:
    reaper = Reaper(FILES, life.fatal_step)
    threading.setprofile(reaper)
    sys.setprofile(reaper)
    asyncio.run(live(life, maker))
    sys.setprofile(None)
    return reaper.num_steps


def _run(life: Life, maker: TraceMaker) -> int | None:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, str(_live(life, maker)).encode())
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as steps:
        text = steps.read()
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL) or (code and not life.fatal_step):
        raise RuntimeError(f"a life ended with {code}")
    return int(text) if text else None


def answer(run: Callable[[Life, TraceMaker], object]) -> None:
    """Run a life for each line of stdin, and answer each with a line."""
    torch.set_num_threads(1)  # a process with threads must not fork
    logging.disable()
    maker = TraceMaker(Path(sys.argv[1]))
    _say("ready")
    for line in sys.stdin:
        _say(run(Life(**json.loads(line)), maker))


def _say(value: object) -> None:
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


def request(life: Life) -> str:
    """The line for a life."""
    return f"{json.dumps(asdict(life))}\n"


if __name__ == "__main__":
    answer(_run)
