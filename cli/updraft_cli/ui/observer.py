"""Reads the backend again and again, and keeps its last state and samples for the charts.

While somebody looks, it reads every second, else every ten seconds; but never more than a fifth of the time, so that a slow
backend is not kept busy. All calls of the backend run one after the other on one thread. Nothing that a backend raises ends
the reading: pages would show their last state as if it were current.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from updraft_chassis.errors import UpdraftError
from updraft_cli.backends.protocol import ConsoleBackend
from updraft_cli.backends.snapshot import Snapshot
from updraft_cli.ui.samples import Recent, Samples
from updraft_cli.ui.views.figures import counters, figures
from updraft_cli.worker import Worker

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds between two reads."""

    watched_s: float = 1.0
    idle_s: float = 10.0
    fresh_s: float = 2.0
    """A page is made from a state that is at most this old, if the backend answers in time."""
    patience_s: float = 0.7
    """How long a page waits for that."""


PACE = Pace()
_SHARE = 5
"""One read takes at most one of this many parts of the time."""


class Observer:
    def __init__(self, backend: ConsoleBackend, pace: Pace = PACE) -> None:
        self.backend = backend
        self.snapshot: Snapshot
        """Set by `begin`."""
        self.problem = ""
        """Why the last read failed; empty if it did not."""
        self.revision = 0
        """Grows with every read."""
        self.is_closed = False
        self._pace = pace
        self._worker = Worker("console-backend")
        self._states: Generator[Snapshot] = backend.snapshots()
        self._samples: dict[str, Samples] = {}
        self._recent: dict[str, Recent] = {}
        self._num_watchers = 0
        self._read_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()

    def begin(self) -> None:
        """Read the first state; raises what the backend raises."""
        try:
            self._keep(self._worker.submit(partial(next, self._states)).result())
        except BaseException:
            self.close()
            raise

    async def run(self) -> None:
        """Read until it is closed."""
        self._loop = asyncio.get_running_loop()
        while True:
            began_s = time.monotonic()
            await self._read()
            took_s = time.monotonic() - began_s
            pause_s = max(self._pace.watched_s if self._num_watchers else self._pace.idle_s, took_s * (_SHARE - 1))
            self._wake.clear()
            if self.is_closed:  # perhaps during the read, and then its call to wake up has just been cleared
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()

    def close(self) -> None:
        """Stop reading, and end all waits; from any thread, and more than once."""
        self.is_closed = True
        self._worker.close()
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._end_waits)

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call of the backend on its thread."""
        return await asyncio.wrap_future(self._worker.submit(partial(function, *args, **kwargs)))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Read often for the length of a block."""
        self._num_watchers += 1
        self._wake.set()
        try:
            yield
        finally:
            self._num_watchers -= 1

    async def wait(self, revision: int, within_s: float) -> bool:
        """Return True once there is a newer state than `revision`, False if none came in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self.revision <= revision and not self.is_closed:
                    await self._changed.wait()
        return self.revision > revision

    async def rest(self, for_s: float) -> None:
        """Return after a time, or once this is closed."""
        await self.wait(sys.maxsize, for_s)

    @property
    def age_s(self) -> float:
        """Seconds since the last read that succeeded."""
        return time.monotonic() - self._read_s

    async def refresh(self) -> None:
        """Wait a moment for a state that is not old; a backend that does not answer in time leaves the last one."""
        if self.age_s > self._pace.fresh_s:
            await self.renew()

    async def renew(self) -> None:
        """Wait a moment for a state that was read after now."""
        revision = self.revision
        self._wake.set()
        await self.wait(revision, self._pace.patience_s)

    def samples(self, speculator: str) -> Samples:
        return self._samples.setdefault(speculator, Samples())

    async def _read(self) -> None:
        try:
            self._keep(await self.call(next, self._states))
        except UpdraftError as error:
            self._note(str(error))
        except Exception as error:
            # An answer that is not the backend's, for example. The next read may be better, and each may be the last.
            if not self.problem:
                logger.exception("The console could not read its backend")
            self._note(f"the backend's answer cannot be read ({type(error).__name__}: {error})")
        self.revision += 1
        self._announce()

    def _note(self, problem: str) -> None:
        self.problem = problem
        self._states = self.backend.snapshots()  # a generator that has raised has ended

    def _keep(self, snapshot: Snapshot) -> None:
        self.snapshot, self.problem, self._read_s = snapshot, "", time.monotonic()
        at_s = snapshot.time.timestamp()
        for one in snapshot.speculators:
            recent = self._recent.setdefault(one.name, Recent())
            lengths = recent.add(at_s, counters(one.speculator), one.speculator.pods.num)
            samples = self.samples(one.name)
            samples.add(at_s, figures(one, snapshot.installation.about(one.name), lengths))
            samples.swaps.add(at_s, {pod.name: pod.version for pod in one.pods if pod.version is not None})

    def _end_waits(self) -> None:
        self._wake.set()
        self._announce()

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
