"""The time of an optimizer step by phase, measured without waiting for the device.

On a GPU, a call returns before its kernels run. There, events in the stream mark the ends of a phase, and are read once the
device has passed them. Elsewhere a monotonic clock suffices. Rejected: `torch.cuda.synchronize` around each phase, because the
queue runs empty, and `torch.profiler`, which costs more than it shows.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch

Phase = Literal[
    "compile",
    "data",
    "transfer",
    "forward",
    "backward",
    "all_reduce",
    "optimizer",
    "estimate",
    "fit",
    "save",
    "publish",
    "waiting",
]
"""compile: torch.compile works, once. data: samples are drawn, decoded and packed. transfer: batches move to the device.
forward: with the loss and its gradient by the draft's states, because both are fused with the head. all_reduce: gradients are
summed over ranks, and slower ranks are awaited. optimizer: with the norm of the gradient and the averaged weights. fit: a
draft in closed form. save: training pauses for a save. waiting: there is no request to train on."""

PHASES: tuple[Phase, ...] = get_args(Phase)

_ON_DEVICE = frozenset[Phase]({"transfer", "forward", "backward", "all_reduce", "optimizer"})

_MAX_PASSING = 10_000
"""Phases that are kept until they are taken, which not everybody who trains does."""


class Event(Protocol):
    """A `torch.cuda.Event` with timing."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end_event: Any) -> float: ...


class Spent(NamedTuple):
    """Seconds by phase, and floating-point operations that the model needed."""

    seconds: dict[Phase, float]
    flops: float


class StepTimes:
    """Seconds by phase, summed up until they are taken. Phases are not nested. Not thread-safe."""

    def __init__(
        self,
        device: torch.device | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        new_event: Callable[[], Event] | None = None,
    ) -> None:
        """`device`: where the phases of the device run; None: there are none."""
        self._clock = clock
        self._seconds: dict[Phase, float] = {}
        self.flops = 0.0
        """Added up by whoever computes, until they are taken."""
        self._passing: deque[tuple[Phase, Event, Event]] = deque(maxlen=_MAX_PASSING)
        """Phases that the device may not have passed yet, in the order of the stream."""
        is_cuda = device is not None and device.type == "cuda"
        self._new_event = new_event or (_timed_event if is_cuda else None)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the block as this phase, also if it fails."""
        if self._new_event is not None and name in _ON_DEVICE:
            start, end = self._new_event(), self._new_event()
            start.record()
            try:
                yield
            finally:
                end.record()
                self._passing.append((name, start, end))
            return
        start_s = self._clock()
        try:
            yield
        finally:
            self._count(name, self._clock() - start_s)

    @contextmanager
    def whole(self, name: Phase) -> Iterator[None]:
        """Count the block as this phase, and nothing of the phases and operations within it."""
        outside, self._seconds = self._seconds, {}
        passing, self._passing = self._passing, deque(maxlen=_MAX_PASSING)
        flops, start_s = self.flops, self._clock()
        try:
            yield
        finally:
            self._seconds, self._passing, self.flops = outside, passing, flops
            self._count(name, self._clock() - start_s)

    def take(self) -> Spent:
        """Return the time and operations since the last call. Phases still on the device are in a later one."""
        while self._passing and self._passing[0][2].query():
            name, start, end = self._passing.popleft()
            self._count(name, start.elapsed_time(end) / 1000)
        spent = Spent(self._seconds, self.flops)
        self._seconds, self.flops = {}, 0.0
        return spent

    def _count(self, name: Phase, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


def _timed_event() -> Event:
    event: Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return event
