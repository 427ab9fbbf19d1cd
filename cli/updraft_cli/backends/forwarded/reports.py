"""Reads the registries of a cluster, several at the same time, so that one that hangs delays no other.

Whoever asks gets what has come within a moment, and of a registry that takes longer its last report.
"""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import TypeVar

from updraft_chassis.errors import Unauthenticated, Unavailable, UpdraftError
from updraft_cli.backends.forwarded.event_loop import EventLoop
from updraft_cli.backends.forwarded.tunnels import Tunnel, Tunnels
from updraft_cli.backends.registry import RegistryBackend
from updraft_cli.backends.snapshot import Snapshot, SpeculatorSnapshot
from updraft_cli.worker import Worker

_AT_ONCE = 8
"""Registries that are read at the same time; more than these have to hang before another one waits."""
_PATIENCE_S = 0.5
"""For all reports of one look, because a page waits for them."""
_DETAILS_S = 2.0
"""For the details of one version or pod."""

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The last words of a registry about its speculator; neither field is set while the way to it opens."""

    snapshot: SpeculatorSnapshot | None = None
    problem: str = ""
    """Why it cannot be read."""


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

    def begin(self, worker: Worker) -> Future[None] | None:
        """Read it once more; None: an earlier read has not ended yet, and nobody waits for it any longer."""
        if self._reading is not None:
            if not self._reading.done():
                return None
            ended, self._reading = self._reading, None
            ended.result()  # raises what is no answer of a registry
        self._reading = worker.submit(self._read)
        return self._reading

    def _read(self) -> None:
        registry = self._tunnel.registry()
        if registry is not None:
            registry = replace(registry, run=self._loop.run)
        self.report = Report(problem=self._tunnel.problem) if registry is None else self._ask(registry)
        self.registry = None if self.report.snapshot is None else registry

    def _ask(self, registry: RegistryBackend) -> Report:
        if self._states is None or registry.address != self._address:
            self._states, self._address = registry.snapshots(), registry.address
        try:
            (reported,) = next(self._states).speculators
        except UpdraftError as error:
            self._states = None
            self._tunnel.failed(_sentence(error))
            return Report(problem=self._tunnel.problem)
        except ValueError:
            return Report(problem="it has no such speculator")
        return Report(snapshot=reported)


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

    def read(self, speculators: Iterable[SpeculatorSnapshot]) -> list[Report]:
        """Return the newest report about each of them."""
        readers = [self._reader(one) for one in speculators]
        wait([begun for reader in readers if (begun := reader.begin(self._worker)) is not None], _PATIENCE_S)
        return [reader.report for reader in readers]

    def registry(self, speculator: str) -> RegistryBackend | None:
        """Return the registry of a speculator, if it answered when it was read last."""
        reader = self._readers.get(speculator)
        return reader.registry if reader is not None else None

    def details(self, question: Callable[[], R]) -> R:
        """Return the answer of a registry to a question; Unavailable if it does not come soon."""
        answer = self._worker.submit(question)
        try:
            return answer.result(_DETAILS_S)
        except TimeoutError:
            raise Unavailable(f"it does not answer within {_DETAILS_S:g} s") from None

    def close(self) -> None:
        self._worker.close()
        self._loop.close()

    def _reader(self, one: SpeculatorSnapshot) -> Reader:
        if one.name not in self._readers:
            self._readers[one.name] = Reader(self._tunnels.to(one.speculator.namespace, one.name), self._loop)
        return self._readers[one.name]
