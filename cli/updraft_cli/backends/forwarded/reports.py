"""Reads the registries of a cluster, several at the same time, so that one that hangs delays no other.

Whoever asks gets what has come within a moment, and of a registry that takes longer its last report. Nothing that a registry
answers ends the reading of the others.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from updraft_chassis.errors import Unauthenticated, Unavailable, UpdraftError
from updraft_cli.backends.forwarded.event_loop import EventLoop
from updraft_cli.backends.forwarded.tunnels import Tunnel, Tunnels
from updraft_cli.backends.registry import RegistryBackend
from updraft_cli.backends.snapshot import Snapshot, SpeculatorSnapshot
from updraft_cli.worker import Worker

logger = logging.getLogger(__name__)

_AT_ONCE = 8
"""Registries that are read at the same time; more than these have to hang before another one waits."""
_PATIENCE_S = 0.5
"""For all reports of one look, because a page waits for them."""
_DETAILS_S = 2.0
"""For the details of one version or pod."""
_PAUSE = 4
"""Reads of a registry are at least so many times as far apart as the last one took."""

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The last words of a registry about its speculator; neither `snapshot` nor `problem` is set while the way to it opens."""

    snapshot: SpeculatorSnapshot | None = None
    problem: str = ""
    """Why it cannot be read."""
    time: datetime | None = None
    """When `snapshot` was read."""


class Reader:
    """Reads one registry, again and again. At most one thread does so at a time."""

    def __init__(self, tunnel: Tunnel, loop: EventLoop) -> None:
        self.report = Report()
        self.registry: RegistryBackend | None = None
        """The registry, if it answered last time."""
        self._tunnel = tunnel
        self._loop = loop
        self._states: Generator[Snapshot] | None = None
        self._address = ""
        self._reading: Future[None] | None = None
        self._again_s = float("-inf")
        """When it may be read again, so that a slow one is not kept busy."""

    def begin(self, worker: Worker) -> Future[None] | None:
        """Read it once more. None if a read is still running or a slow one was just done."""
        if self._reading is not None and not self._reading.done():
            return None
        if time.monotonic() < self._again_s:
            return None
        self._reading = worker.submit(self._read)
        return self._reading

    def _read(self) -> None:
        began_s = time.monotonic()
        try:
            registry = self._tunnel.registry()
            if registry is not None:
                registry = replace(registry, run=self._loop.run)
            report = Report(problem=self._tunnel.problem) if registry is None else self._ask(registry)
        except Exception as error:
            # An answer that is none, for example. The next one may be better.
            registry, report = None, Report(problem=f"its answer cannot be read ({type(error).__name__}: {error})")
            self._states = None  # a generator that has raised has ended
            if not self.report.problem:
                logger.exception("The console could not read a registry")
        self.registry = None if report.snapshot is None else registry
        self.report = report
        # Otherwise it is opening, or its tunnel knows when to try again.
        if registry is not None and not self._tunnel.problem:
            now_s = time.monotonic()
            self._again_s = now_s + _PAUSE * (now_s - began_s)

    def _ask(self, registry: RegistryBackend) -> Report:
        if self._states is None or registry.address != self._address:
            self._states, self._address = registry.snapshots(), registry.address
        try:
            speculators = next(self._states).speculators
        except UpdraftError as error:
            self._states = None
            self._tunnel.failed(_sentence(error))
            return Report(problem=self._tunnel.problem)
        if len(speculators) != 1:
            return Report(problem="it has no such speculator")
        return Report(snapshot=speculators[0], time=datetime.now(UTC))


def _sentence(error: UpdraftError) -> UpdraftError:
    """Return an error that a person can act on here, where there are none of the options that the client's sentence names."""
    if isinstance(error, Unauthenticated):
        return Unauthenticated("it does not accept the token of its ServiceAccount; another one is asked for")
    return error


class Reports:
    """The registries of all speculators that were asked for."""

    def __init__(self, tunnels: Tunnels) -> None:
        self._tunnels = tunnels
        self._worker = Worker("console-registry", _AT_ONCE)
        self._loop = EventLoop("console-registry-loop")
        self._readers: dict[str, Reader] = {}
        self._questions: dict[str, Future[Any]] = {}
        """The last one about each speculator."""

    def read(self, speculators: Iterable[SpeculatorSnapshot]) -> list[Report]:
        """Return the newest report about each of them."""
        readers = [self._reader(one) for one in speculators]
        wait([begun for reader in readers if (begun := reader.begin(self._worker)) is not None], _PATIENCE_S)
        return [reader.report for reader in readers]

    def registry(self, speculator: str) -> RegistryBackend | None:
        """Return the registry of a speculator, if it answered when it was read last."""
        reader = self._readers.get(speculator)
        return reader.registry if reader is not None else None

    def details(self, speculator: str, question: Callable[[], R]) -> R:
        """Return the answer of a registry to a question; Unavailable if it, or the one before, does not come soon."""
        before = self._questions.get(speculator)
        if before is not None and not before.done():
            raise Unavailable("it has not answered the last question yet")
        answer = self._worker.submit(question)
        self._questions[speculator] = answer
        try:
            return answer.result(_DETAILS_S)
        except TimeoutError:
            answer.cancel()  # if no thread was free for it, none begins it later
            raise Unavailable(f"it does not answer within {_DETAILS_S:g} s") from None

    def close(self) -> None:
        self._worker.close()
        self._loop.close()

    def _reader(self, one: SpeculatorSnapshot) -> Reader:
        if one.name not in self._readers:
            self._readers[one.name] = Reader(self._tunnels.to(one.speculator.namespace, one.name), self._loop)
        return self._readers[one.name]
