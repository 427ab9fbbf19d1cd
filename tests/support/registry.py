"""A registry in the test's loop or as its own process, and its peers: a sender of drafts, a pod on its stream."""

import asyncio
import os
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
from tests.support.checkpoints import TARGET, Checkpoint
from tests.support.ports import free_port
from tests.support.processes import ServerProcess
from tests.support.wait import LONG_S, until, wait_until

from updraft.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1 import registry_pb2_grpc
from updraft_chassis import lifecycle, rpc
from updraft_registry.process import serve
from updraft_registry.settings import RegistrySettings

CALL_S = LONG_S


class Registry:
    """Ports and data folder of a registry."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        self.data = folder / "registry"
        self.port, self.metrics_port = free_port(), free_port()
        self.settings: dict[str, Any] = {
            "data_dir": self.data,
            "port": self.port,
            "metrics_port": self.metrics_port,
            "strategy": "Immediate",
        } | settings

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def fetch(self, path: str) -> str:
        """The response of its HTTP port; empty without one."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=CALL_S) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    def metric(self, sample: str) -> float:
        """The value of one sample, e.g. `updraft_registry_version{role="stable",speculator="default"}`; 0 if there is none."""
        for line in self.fetch("/metrics").splitlines():
            if line.startswith(f"{sample} "):
                return float(line.rpartition(" ")[2])
        return 0.0


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[Registry]:
    """A registry in this event loop, built as the process builds it."""
    registry, stop = Registry(folder, **settings), lifecycle.Stop()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve(RegistrySettings(**registry.settings), stop))
        await until(lambda: registry.fetch("/readyz") == "ready\n", what="the registry is ready")
        yield registry
        stop.request()


class RegistryProcess(Registry, ServerProcess):
    """`python -m updraft_registry` on a data folder; started, killed and started again at the same address."""

    def __init__(self, folder: Path, **settings: object) -> None:
        Registry.__init__(self, folder, **settings)
        ServerProcess.__init__(self)

    @property
    def log(self) -> str:
        """Its stderr, over all starts."""
        return (self.folder / "registry.log").read_text()

    def spawn(self) -> None:
        """Start it and do not wait."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("UPDRAFT_")}
        environ |= {f"UPDRAFT_REGISTRY_{name.upper()}": str(value) for name, value in self.settings.items()}
        with (self.folder / "registry.log").open("ab") as log:
            self._spawn([sys.executable, "-m", "updraft_registry"], env=environ, stderr=log)

    def start(self) -> None:
        """Start it and wait until it is ready."""
        self.spawn()
        wait_until(lambda: self.fetch("/readyz") == "ready\n" or not self.is_running, what="the registry is ready")
        assert self.is_running, self.log


@asynccontextmanager
async def client(address: str) -> AsyncIterator["registry_pb2_grpc.RegistryAsyncStub"]:
    """A stub on a channel of its own."""
    async with rpc.channel(address) as channel:
        yield registry_stub(channel)


async def found_again(channel: grpc.aio.Channel) -> None:
    """Wait until a channel has noticed that its registry is back: before, it refuses calls without trying."""
    async with asyncio.timeout(CALL_S):
        await channel.channel_ready()


def registry_stub(channel: grpc.aio.Channel) -> "registry_pb2_grpc.RegistryAsyncStub":
    return registry_pb2_grpc.RegistryStub(channel)


def parts(manifest: pb.Manifest, data: bytes, *, chunk_bytes: int = 4096) -> Iterator[pb.PublishRequest]:
    """The messages of an upload."""
    yield pb.PublishRequest(manifest=manifest)
    for offset in range(0, len(data), chunk_bytes):
        yield pb.PublishRequest(chunk=pb.Chunk(offset=offset, data=data[offset : offset + chunk_bytes]))


async def send(
    stub: "registry_pb2_grpc.RegistryAsyncStub", messages: Iterable[pb.PublishRequest]
) -> pb.PublishResponse:
    """One upload of these messages; raises the registry's error."""
    with rpc.errors():
        return await stub.Publish(iter(messages), timeout=CALL_S)


async def publish(
    stub: "registry_pb2_grpc.RegistryAsyncStub", weights: Checkpoint, **fields: Any
) -> pb.PublishResponse:
    """Publish a checkpoint; `fields` override its manifest."""
    return await send(stub, parts(weights.manifest(**fields), weights.data))


async def state(stub: "registry_pb2_grpc.RegistryAsyncStub", speculator: str = "default") -> pb.SpeculatorState:
    """The state now."""
    with rpc.errors():
        call = stub.Watch(pb.WatchRequest(speculator=speculator), timeout=CALL_S)
        try:
            async for response in call:
                return response.state
        finally:
            call.cancel()
    raise AssertionError("the watch ended without a state")


async def fetch(stub: "registry_pb2_grpc.RegistryAsyncStub", version: int, *, offset: int = 0) -> bytes:
    """The weights of a version from an offset."""
    data = b""
    with rpc.errors():
        async for response in stub.Fetch(
            pb.FetchRequest(speculator="default", version=version, offset=offset), timeout=CALL_S
        ):
            assert response.WhichOneof("part") == "start" or response.chunk.offset == offset + len(data)
            data += response.chunk.data
    return data


class PodStream:
    """A pod's side of `Fleet.Connect`, under the test's hand."""

    def __init__(self, channel: grpc.aio.Channel, name: str = "pod-0", *, target: str = TARGET) -> None:
        self.name = name
        self.identity = fleet_pb2.PodIdentity(
            speculator="default", pod=name, engine="test/1", target_fingerprint=target, boot_id="boot-1"
        )
        self.directive = fleet_pb2.Directive()
        self.num_directives = 0
        stub: fleet_pb2_grpc.FleetAsyncStub = fleet_pb2_grpc.FleetStub(channel)
        self._call = stub.Connect()

    async def report(self, *, loaded: tuple[int, str] = (0, ""), **fields: Any) -> None:
        """Send a report; `loaded` is a version and its tensors' digest."""
        version, digest = loaded
        report = fleet_pb2.PodReport(
            identity=self.identity, loaded=fleet_pb2.Loaded(version=version, tensors_digest=digest), **fields
        )
        with rpc.errors():
            await self._call.write(fleet_pb2.ConnectRequest(report=report))

    async def receive(self) -> fleet_pb2.Directive:
        """The next directive; raises what the stream ends with."""
        with rpc.errors():
            async with asyncio.timeout(CALL_S):
                response = await self._call.read()
        assert isinstance(response, fleet_pb2.ConnectResponse), f"the stream ended: {response}"
        self.directive = response.directive
        self.num_directives += 1
        return self.directive

    async def receive_version(self, version: int) -> fleet_pb2.Directive:
        """Directives up to the one that orders this version."""
        while (await self.receive()).serve_version != version:
            pass
        return self.directive

    async def answer(self, outcome: fleet_pb2.Outcome.ValueType, *, loaded: tuple[int, str], reason: str = "") -> None:
        """Report how the last directive went."""
        status = fleet_pb2.DirectiveStatus(
            nonce=self.directive.nonce, outcome=outcome, version=self.directive.serve_version, reason=reason
        )
        await self.report(loaded=loaded, status=status)

    async def end(self) -> None:
        """Close our side and read to the end."""
        with rpc.errors():
            await self._call.done_writing()
            async with asyncio.timeout(CALL_S):
                while await self._call.read() is not grpc.aio.EOF:
                    pass

    def cancel(self) -> None:
        self._call.cancel()
