"""A life of a trainer, and the two parts of it that are made up (tests.support.dying_trainer).

The stream is a file of acknowledged entries; what is not in it is delivered again. The learner's only weights are the list of
all uses in their order, so a state shows what its weights have learned.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from tests.support.clock import ManualClock
from tests.support.states import DRAFT
from tests.support.traces import TraceMaker
from torch import Tensor

from updraft_chassis.clock import SystemClock
from updraft_chassis.lifecycle import Stop
from updraft_chassis.streams import Entry
from updraft_draft.config import DraftConfig
from updraft_trainer.coordination.ranks import Ranks
from updraft_trainer.data.retention import ReplayLimits
from updraft_trainer.data.sample import Sample
from updraft_trainer.learning.compute import Compute
from updraft_trainer.learning.gradients import StepReport
from updraft_trainer.learning.learner import Learner
from updraft_trainer.learning.step_time import StepTimes

ACKED = "acked"

MAX_USES = 2

_IDLE_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """`num_traces` are in the streams of all ranks, every fifth held out. `fatal_step`: 0 for a life to the end."""

    folder: str
    num_traces: int
    max_bytes: int
    num_ranks: int = 1
    fatal_rank: int = 0
    fatal_step: int = 0

    @property
    def folders(self) -> list[Path]:
        """One for each rank."""
        return [Path(self.folder) / f"rank-{rank}" for rank in range(self.num_ranks)]

    @property
    def limits(self) -> ReplayLimits:
        return ReplayLimits.of(self.max_bytes)

    @property
    def acked(self) -> list[int]:
        """The numbers of the traces that any rank has acknowledged."""
        return [number for folder in self.folders for number in acked(folder)]


def data_of(maker: TraceMaker, number: int) -> bytes:
    return maker.data(number, evaluation=number % 5 == 4)


def names_of(maker: TraceMaker, num_traces: int) -> list[str]:
    """The ids of the traces."""
    return [maker.trace(n, evaluation=n % 5 == 4).header.trace_id.hex() for n in range(num_traces)]


def acked(folder: Path) -> list[int]:
    """The numbers of the traces that one rank has acknowledged."""
    path = folder / ACKED
    return [int(line) for line in path.read_text().split()] if path.exists() else []


class FileStream:
    """Delivers each trace of a rank once in a life, unless it was acknowledged in an earlier one."""

    def __init__(self, folder: Path, numbers: Sequence[int], maker: TraceMaker) -> None:
        settled = set(acked(folder))
        now_ms = int(SystemClock().now() * 1000)
        self._waiting = [
            Entry(id=f"{now_ms}-{number}", data=data_of(maker, number), deliveries=1)
            for number in numbers
            if number not in settled
        ]
        self._path = folder / ACKED
        self.num_left = len(self._waiting)
        """Traces that were not acknowledged yet."""

    async def read(self, *, count: int, block: timedelta) -> list[Entry]:
        entries, self._waiting = self._waiting[:count], self._waiting[count:]
        return entries

    async def ack(self, ids: Iterable[str]) -> None:
        """At once, as Redis does."""
        lines = [f"{id_.partition('-')[2]}\n" for id_ in ids]
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, "".join(lines).encode())
        os.close(file)
        self.num_left -= len(lines)


@dataclass(frozen=True)
class Network:
    """The part of a draft that commands and states have."""

    config: DraftConfig
    token_ids: Tensor


class UseLearner:
    """Its weights are the numbers of the traces that all ranks have trained it on, in their order."""

    step_rate = 0.0
    is_cold = False

    def __init__(self, ranks: Ranks, names: Sequence[str], clock: ManualClock) -> None:
        self._ranks = ranks
        self._names = names
        self._clock = clock
        self.network = Network(DRAFT, torch.arange(DRAFT.draft_vocab_size))
        self.times = StepTimes()
        self.trail: list[int] = []
        self.step = 0

    def warm_up(self) -> float:
        return 0.0

    def train(self, samples: list[Sample]) -> StepReport:
        own = [self._names.index(sample.trace_id) for sample in samples]
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


class AllUsed(Stop):
    """Stops a trainer when it rests for the second time since all traces were stored."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self._life = life
        self._were_stored = False

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Called when there is nothing to train on."""
        if self._were_stored:
            self.request()
        self._were_stored = len(self._life.acked) == self._life.num_traces
        return await super().wait(_IDLE_S)


def request(life: Life) -> str:
    """The line for a life."""
    return f"{json.dumps(asdict(life))}\n"
