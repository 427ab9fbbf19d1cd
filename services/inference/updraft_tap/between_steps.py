"""Runs a piece of work between two steps of the engine: on the engine's thread if it is busy, else on the caller's.

The engine is asked nothing and never waits for a lock, except while such work runs.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

_POLL_S = 0.002


class NeverBetweenStepsError(Exception):
    """The engine stayed within one step for too long."""


class _Work:
    def __init__(self, body: Callable[[], None]) -> None:
        self._body = body
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.took_s = 0.0

    def run(self, synchronize: Callable[[], None]) -> None:
        """The time is that of the work on the device too, so it contains what the device still had to do before."""
        started = time.perf_counter()
        try:
            synchronize()
            self._body()
            synchronize()
        except BaseException as error:  # noqa: BLE001  (the caller's, and the thread may be the engine's)
            self.error = error
        finally:
            self.took_s = time.perf_counter() - started
            self.done.set()


class BetweenSteps:
    """`synchronize` waits until the device has nothing to do; it does so before and after the work."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self._synchronize = synchronize
        self._step = threading.Lock()
        self._is_within = False
        """Used by the engine's thread alone."""
        self._is_due = False
        """The engine waits to begin a step, so the next work is its thread's: a lock alone would let it wait for ever."""
        self._handover = threading.Lock()
        self._waiting: _Work | None = None

    def settle(self) -> None:
        """Wait until the device has done what was submitted so far; the engine goes on meanwhile."""
        self._synchronize()

    def begin(self) -> None:
        """A step begins; called on the engine's thread. A step that was begun and never ended is ended by this."""
        if not self._is_within:
            self._is_due = True
            self._step.acquire()
            self._is_due, self._is_within = False, True
        if self._waiting is not None:
            self._run_waiting()

    def end(self) -> None:
        """The step ended. Once is enough, and more do no harm."""
        if self._is_within:
            self._is_within = False
            self._step.release()

    def run(self, body: Callable[[], None], timeout_s: float) -> float:
        """Run it between two steps, and return for how many seconds. One caller at a time; each work has a gap of its own.

        Raises what it raises, and NeverBetweenStepsError.
        """
        self._waiting = work = _Work(body)
        try:
            self._wait(work, timeout_s)
        finally:
            self._taken()  # whatever happened, it is not done later
        if work.error is not None:
            raise work.error
        return work.took_s

    def _wait(self, work: _Work, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not work.done.is_set():
            if not self._is_due and self._step.acquire(blocking=False):
                try:
                    self._run_waiting()
                finally:
                    self._step.release()
            elif time.monotonic() > deadline and self._taken() is not None:
                raise NeverBetweenStepsError(f"the engine was within one step for {timeout_s:.0f} s")
            work.done.wait(_POLL_S)

    def _run_waiting(self) -> None:
        work = self._taken()
        if work is not None:
            work.run(self._synchronize)

    def _taken(self) -> _Work | None:
        with self._handover:
            work, self._waiting = self._waiting, None
            return work


class Lockstep(Protocol):
    """How the ranks of an engine change their weights together. Each calls it on the thread of its swap."""

    @property
    def is_alone(self) -> bool:
        """There is one rank."""
        ...

    def write(
        self, body: Callable[[], None], undo: Callable[[], None] | None, timeout_s: float, draft: str = ""
    ) -> float:
        """Run `body` on all ranks between the same two steps, and return for how many seconds at most.

        A body that fails leaves all as it was on its own rank; `undo` then runs on all before the next step, and all raise.
        None: it cannot be undone. `draft` is the digest of the whole draft, which must be the same on all ranks.
        """
        ...

    def agree(self, problem: str) -> None:
        """Wait for the problems of all ranks. Raises RefusedError without one of its own if another rank has one."""
        ...


class OneRank:
    """The lockstep of an engine that has one rank."""

    is_alone = True

    def __init__(self, between: BetweenSteps) -> None:
        self._between = between

    def write(
        self, body: Callable[[], None], undo: Callable[[], None] | None, timeout_s: float, draft: str = ""
    ) -> float:
        """A body that fails leaves all as it was."""
        return self._between.run(body, timeout_s)

    def agree(self, problem: str) -> None:
        """There is nobody else."""
