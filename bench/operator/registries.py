"""Registries of all speculators in one server, whose numbers move all the time and whose decisions never change."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1 import registry_pb2_grpc
from updraft_chassis import rpc

_START_S = 30.0


class Registries(registry_pb2_grpc.RegistryServicer):
    """Version 1 of each speculator is stable. Every `period_s`, its pods have served more requests."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._policies: dict[str, pb.RolloutPolicy] = {}
        self._has_policy: dict[str, asyncio.Event] = {}

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:  # noqa: N802
        name, steps, chance = request.speculator, 1000, random.Random(request.speculator)
        changed = self._has_policy.setdefault(name, asyncio.Event())
        wait_s = self._period_s * chance.random()
        while True:
            changed.clear()
            steps += chance.randrange(1, 1000)
            traffic = pb.VersionTraffic(version=1, verify_steps=steps, tokens=round(steps * chance.uniform(1.5, 3.0)))
            state = pb.SpeculatorState(
                speculator=name,
                stable=1,
                latest=1,
                policy=self._policies.get(name),
                pods=pb.Pods(connected=2, serving_stable=2),
                traffic=[traffic],
            )
            yield pb.WatchResponse(state=state)
            try:
                async with asyncio.timeout(wait_s):
                    await changed.wait()
            except TimeoutError:
                wait_s = self._period_s

    async def List(self, request: pb.ListRequest, context: Any) -> pb.ListResponse:  # noqa: N802
        manifest = pb.Manifest(digest=f"sha256:{1:064x}", source=pb.SOURCE_TRAINER)
        version = pb.Version(version=1, phase=pb.PHASE_STABLE, manifest=manifest, published_unix_ms=1, reason="bench")
        return pb.ListResponse(versions=[version])

    async def History(self, request: pb.HistoryRequest, context: Any) -> pb.HistoryResponse:  # noqa: N802
        return pb.HistoryResponse()

    async def SetPolicy(self, request: pb.SetPolicyRequest, context: Any) -> pb.SetPolicyResponse:  # noqa: N802
        self._policies[request.speculator] = request.policy
        self._has_policy.setdefault(request.speculator, asyncio.Event()).set()
        return pb.SetPolicyResponse()


@contextmanager
def registries(period_s: float) -> Iterator[int]:
    """Serve them in a thread until the block ends. Yields their port on the loopback interface."""
    started, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    port = list[int]()

    async def serve() -> None:
        server = rpc.server()
        registry_pb2_grpc.add_RegistryServicer_to_server(Registries(period_s), server)  # type: ignore[abstract] # the operator calls no other method
        port.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        started.set()
        await stop.wait()
        await server.stop(None)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert started.wait(_START_S), "the registries did not start"
        yield port[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
