"""One fleet from its first version to a killed registry: the real registry, and simulated pods with a connection each.

The clock stops when the registry's own `Watch` stream shows that all pods have reported.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import grpc.aio
import psutil
from bench.fleet.usage import Usage, measured
from bench.fleet.weights import versions
from tests.support.certificates import Authority
from tests.support.checkpoints import TARGET, Checkpoint, evaluation
from tests.support.registry import RegistryProcess, found_again, parts, registry_stub, send
from tests.support.sim_library import Library
from tests.support.sim_pods import Behaviour, SimPod, pods

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import Unavailable

REPORT_S = 10.0
BEHAVIOUR = Behaviour(target=TARGET, report_s=REPORT_S, requests_per_s=2.0)
"""With traffic, so that reports contain the counters of a busy engine."""

TIMEOUT_S = 60.0
TIMEOUT_PER_POD_S = 0.2
"""About ten times as long as anything should take."""

PAUSE_S = 3.0
"""Between two versions, for the last acknowledgements."""

DOWN_S = 10.0
"""Downtime of a killed registry; after it, the pods reconnect at their slowest rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRollout:
    """One version, from the start of its upload until all pods have reported that they serve it."""

    usage: Usage
    upload_s: float
    """Until the registry had received, checked, stored and accepted it."""
    decode_s: float
    """Time of a pod to decode and hash it: measured in one pod, a wait in the others."""
    weights_bytes: int
    received_bytes: int
    """Weights and deltas that all pods received, without the messages around them."""
    deltas: int
    """Pods that received a delta; the others received whole weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """After a kill: seconds from the start until the registry serves, and until the last pod has reported again."""

    ready_s: float
    back_s: float
    usage: Usage
    moved: int
    """Pods that loaded a draft meanwhile."""
    received_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRun:
    """All measurements of a fleet of one size."""

    pods: int
    has_tls: bool
    load: float
    """Load average before the run; above 0, other processes took CPU time."""
    empty_bytes: int
    """Resident memory of the registry before the first pod."""
    connecting: Usage
    whole: MeasuredRollout
    """The first version, which no pod can receive as a delta."""
    deltas: list[MeasuredRollout]
    steady: Usage
    reports_per_s: float
    """During `steady`."""
    restart: Restart


class RunningFleet:
    """Pods, their registry, and a `Watch` stream."""

    def __init__(
        self, process: RegistryProcess, fleet_pods: list[SimPod], library: Library, channel: grpc.aio.Channel
    ) -> None:
        self._process = process
        self._pods = fleet_pods
        self._library = library
        self._channel = channel
        self._stub = registry_stub(channel)
        self._number = 0
        self._digest = ""

    @property
    def registry(self) -> psutil.Process:
        return psutil.Process(self._process.pid)

    async def connect(self) -> Usage:
        """Wait until all pods have reported."""
        with measured(self.registry) as usage:
            await self._until(lambda state: state.pods.connected == len(self._pods), "every pod is connected")
        return usage

    async def roll_out(self, weights: Checkpoint) -> MeasuredRollout:
        """Publish a version as a trainer does, and wait until all pods serve it."""
        received, deltas = self._library.received.total(), self._library.fetches["delta"]
        with measured(self.registry) as usage:
            began_s = time.perf_counter()
            await self._publish(weights)
            upload_s = time.perf_counter() - began_s
            await self._until(self._is_everywhere, f"every pod serves version {self._number}")
        self.check()
        return MeasuredRollout(
            usage=usage,
            upload_s=upload_s,
            decode_s=self._library.verify_s,
            weights_bytes=len(weights.data),
            received_bytes=self._library.received.total() - received,
            deltas=self._library.fetches["delta"] - deltas,
        )

    async def stay(self, seconds: float) -> tuple[Usage, float]:
        """Wait without publishing. Return the usage, and the reports per second."""
        reports = await self._num_reports()
        with measured(self.registry) as usage:
            await asyncio.sleep(seconds)
        return usage, (await self._num_reports() - reports) / usage.seconds

    async def restart(self) -> Restart:
        """Kill the registry, and restart it on its data."""
        loads, received = [len(pod.served) for pod in self._pods], self._library.received.total()
        self._process.kill()
        await asyncio.sleep(DOWN_S)
        self.check()
        began_s = time.perf_counter()
        await asyncio.to_thread(self._process.start)
        ready_s = time.perf_counter() - began_s
        with measured(self.registry) as usage:
            await found_again(self._channel)
            await self._until(self._is_everywhere, "every pod is back")
            back_s = time.perf_counter() - began_s
            await asyncio.sleep(REPORT_S)  # by now, pods with another directive would have reported it
        self.check()
        return Restart(
            ready_s=ready_s,
            back_s=back_s,
            usage=usage,
            moved=sum(len(pod.served) != before for pod, before in zip(self._pods, loads, strict=True)),
            received_bytes=self._library.received.total() - received,
        )

    def check(self) -> None:
        """Assert that every pod serves the bytes that were published last, whatever the registry reports."""
        wrong = [
            pod.name for pod in self._pods if (pod.loaded.version, pod.loaded.digest) != (self._number, self._digest)
        ]
        assert not wrong, f"{len(wrong)} pods do not serve {self._digest}, {wrong[:5]} among them"

    async def _publish(self, weights: Checkpoint) -> None:
        source = pb.SOURCE_TRAINER if self._number else pb.SOURCE_INITIAL
        evidence = evaluation(baseline=self._number) if self._number else None
        manifest = weights.manifest(source=source, parent_version=self._number, evaluation=evidence)
        answer = await send(self._stub, parts(manifest, weights.data, chunk_bytes=rpc.CHUNK_BYTES))
        self._number, self._digest = answer.version.version, weights.digest

    def _is_everywhere(self, state: pb.SpeculatorState) -> bool:
        return (state.stable, state.pods.serving_stable) == (self._number, len(self._pods))

    async def _until(self, condition: Callable[[pb.SpeculatorState], bool], what: str) -> None:
        """Watch the registry's state until the condition holds, or raise TimeoutError."""
        timeout_s = TIMEOUT_S + TIMEOUT_PER_POD_S * len(self._pods)
        try:
            with rpc.errors():
                async for response in self._stub.Watch(pb.WatchRequest(speculator="default"), timeout=timeout_s):
                    if condition(response.state):
                        return
        except Unavailable as error:
            raise TimeoutError(f"with {len(self._pods)} pods, {what}: not within {timeout_s:g} s") from error

    async def _num_reports(self) -> float:
        return await asyncio.to_thread(self._process.metric, "updraft_registry_report_lag_seconds_count")


@asynccontextmanager
async def running(num_pods: int, *, has_tls: bool) -> AsyncIterator[RunningFleet]:
    """A new registry, and a fleet that begins to connect."""
    library = Library()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings, credentials = _tls(Path(folder)) if has_tls else ({}, Credentials())
        process = stack.enter_context(RegistryProcess(Path(folder), **settings))
        trusted = credentials.tls()
        tls = None if trusted is None else trusted.get()
        async with (
            rpc.channel(process.address, credentials) as channel,
            pods(process.address, num_pods, BEHAVIOUR, library=library, tls=tls) as fleet_pods,
        ):
            yield RunningFleet(process, fleet_pods, library, channel)


def _tls(folder: Path) -> tuple[dict[str, Path], Credentials]:
    """A certificate as the operator makes them, for the address of the benchmark."""
    authority = Authority(folder / "ca")
    made = authority.server()
    return {"tls_cert_file": made.cert_file, "tls_key_file": made.key_file}, Credentials(ca_file=authority.file)


async def run(num_pods: int, *, seed: int, num_deltas: int, steady_s: float, has_tls: bool = False) -> FleetRun:
    """Measure a fleet of this size; TimeoutError if it does not get through."""
    load, (first, *others) = os.getloadavg()[0], islice(versions(seed), 1 + num_deltas)
    async with running(num_pods, has_tls=has_tls) as fleet:
        empty_bytes = fleet.registry.memory_info().rss
        connecting, whole, deltas = await fleet.connect(), await fleet.roll_out(first), []
        for weights in others:
            await asyncio.sleep(PAUSE_S)
            deltas.append(await fleet.roll_out(weights))
        await asyncio.sleep(REPORT_S)
        steady, reports_per_s = await fleet.stay(steady_s)
        return FleetRun(
            pods=num_pods,
            has_tls=has_tls,
            load=load,
            empty_bytes=empty_bytes,
            connecting=connecting,
            whole=whole,
            deltas=deltas,
            steady=steady,
            reports_per_s=reports_per_s,
            restart=await fleet.restart(),
        )
