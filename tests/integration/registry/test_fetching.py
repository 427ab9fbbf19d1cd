"""Weights to many readers: as deltas where that saves bytes, a few at a time, and everyone in turn."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from grpc.aio import UnaryStreamCall
from prometheus_client import CollectorRegistry
from tests.support.archives import Opened
from tests.support.checkpoints import Checkpoint, draft
from tests.support.registry import CALL_S, Registry, client, fetch, publish, running
from tests.support.wait import until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts import transfer
from updraft_chassis import rpc
from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import InvalidInput
from updraft_registry.api.deltas import Deltas
from updraft_registry.api.fetching import Fetching, Limits
from updraft_registry.control import Control
from updraft_registry.fleet import Fleet
from updraft_registry.metrics import Metrics

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

LARGE_COLUMNS = 2_000_000  # 32 MB: more than gRPC takes for a reader that does not read


@asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[tuple[Registry, "RegistryAsyncStub"]]:
    async with running(folder, **settings) as registry, client(registry.address) as stub:
        yield registry, stub


def weights(seed: int) -> Checkpoint:
    return draft(seed, columns=4096)


def asking(version: int, *, base: Checkpoint | None = None, base_version: int = 1, offset: int = 0) -> pb.FetchRequest:
    request = pb.FetchRequest(speculator="default", version=version, offset=offset)
    if base is not None:
        request.delta_base_version, request.delta_base_digest = base_version, base.digest
    return request


async def start(stub: "RegistryAsyncStub", request: pb.FetchRequest) -> pb.FetchResponse.Start:
    """What the registry says that it will send."""
    with rpc.errors():
        call = stub.Fetch(request, timeout=CALL_S)
        async for response in call:
            if response.HasField("start"):
                call.cancel()
                return response.start
    raise AssertionError("the fetch ended without a start")


async def started(call: "UnaryStreamCall[pb.FetchRequest, pb.FetchResponse]") -> None:
    """Read nothing but the start."""
    response = await call.read()
    assert isinstance(response, pb.FetchResponse)
    assert response.HasField("start")


def fetched(registry: Registry, encoding: str) -> float:
    return registry.metric(f'updraft_registry_fetched_bytes_total{{encoding="{encoding}"}}')


async def test_a_pod_that_holds_the_parent_is_sent_a_delta(tmp_path: Path) -> None:
    async with serving(tmp_path) as (registry, stub):
        for seed in (1, 2):
            await publish(stub, weights(seed))
        folder = tmp_path / "pod"
        await transfer.download(stub, "default", 1, folder)
        await transfer.download(stub, "default", 2, folder)
        assert (folder / "2" / "model.safetensors").read_bytes() == weights(2).data
        assert fetched(registry, "identity") == len(weights(1).data)
        assert 0 < fetched(registry, "delta") < len(weights(2).data)
        assert registry.metric('updraft_registry_fetches_total{answer="delta"}') == 1


@pytest.mark.parametrize(
    ("base", "base_version"),
    [
        pytest.param(None, 1, id="none"),
        pytest.param(weights(9), 1, id="other bytes than ours"),
        pytest.param(weights(1), 7, id="a version that we do not have"),
        pytest.param(weights(2), 2, id="the version itself"),
    ],
)
async def test_who_holds_nothing_that_helps_is_sent_the_whole(
    tmp_path: Path, base: Checkpoint | None, base_version: int
) -> None:
    async with serving(tmp_path) as (_, stub):
        for seed in (1, 2):
            await publish(stub, weights(seed))
        started = await start(stub, asking(2, base=base, base_version=base_version))
        assert (started.encoding, started.size_bytes) == (pb.ENCODING_IDENTITY, len(weights(2).data))


async def test_a_registry_may_keep_no_deltas(tmp_path: Path) -> None:
    async with serving(tmp_path, delta_cache_bytes=0) as (_, stub):
        for seed in (1, 2):
            await publish(stub, weights(seed))
        assert (await start(stub, asking(2, base=weights(1)))).encoding == pb.ENCODING_IDENTITY


async def test_a_fleet_that_asks_at_once_costs_one_delta(tmp_path: Path) -> None:
    async with serving(tmp_path, max_fetches=2) as (registry, stub):
        await publish(stub, weights(1))
        folders = [tmp_path / f"pod-{i}" for i in range(30)]
        await asyncio.gather(*(transfer.download(stub, "default", 1, folder) for folder in folders))
        await publish(stub, weights(2))
        await asyncio.gather(*(transfer.download(stub, "default", 2, folder) for folder in folders))
        assert {(folder / "2" / "model.safetensors").read_bytes() for folder in folders} == {weights(2).data}
        assert registry.metric('updraft_registry_deltas_total{result="made"}') == 1
        assert registry.metric('updraft_registry_fetches_total{answer="delta"}') == 30
        assert registry.metric("updraft_registry_waiting_fetches") == 0


async def test_a_delta_is_read_from_any_offset(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, stub):
        for seed in (1, 2):
            await publish(stub, weights(seed))
        whole = [response async for response in stub.Fetch(asking(2, base=weights(1)), timeout=CALL_S)]
        rest = [response async for response in stub.Fetch(asking(2, base=weights(1), offset=1000), timeout=CALL_S)]
        assert rest[0] == whole[0]
        assert rest[1].chunk.data == whole[1].chunk.data[1000:]
        with pytest.raises(InvalidInput, match="beyond the end"):
            await start(stub, asking(2, base=weights(1), offset=whole[0].start.size_bytes + 1))


@pytest.mark.attack(
    boundary="registry",
    attack="a download that nobody reads",
    outcome="it loses its turn in the queue",
)
async def test_a_reader_that_takes_nothing_loses_its_turn(tmp_path: Path) -> None:
    async with serving(tmp_path, max_fetches=1, fetch_stall_seconds=1) as (registry, stub):
        await publish(stub, draft(1, fc=bytes(LARGE_COLUMNS * 16)))
        async with client(registry.address) as idle:
            stalled = idle.Fetch(asking(1), timeout=CALL_S)
            await started(stalled)
            assert len(await fetch(stub, 1)) > LARGE_COLUMNS
            stalled.cancel()


async def test_a_reader_that_goes_away_leaves_the_queue(tmp_path: Path) -> None:
    async with serving(tmp_path, max_fetches=1) as (registry, stub):
        await publish(stub, draft(1, fc=bytes(LARGE_COLUMNS * 16)))
        async with client(registry.address) as idle:
            calls = [idle.Fetch(asking(1), timeout=CALL_S) for _ in range(3)]
            for call in calls:
                await started(call)
            await until(
                lambda: asyncio.to_thread(lambda: registry.metric("updraft_registry_waiting_fetches") == 2),
                what="two readers wait",
            )
            for call in calls:
                call.cancel()
            await until(
                lambda: asyncio.to_thread(lambda: registry.metric("updraft_registry_waiting_fetches") == 0),
                what="nobody waits",
            )
        assert len(await fetch(stub, 1)) > LARGE_COLUMNS


async def test_a_reader_hears_while_it_waits(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    opened.publish(weights(1))
    metrics = Metrics(CollectorRegistry())
    control = Control(opened.archive, Fleet(), SystemClock(), metrics)
    deltas = Deltas(tmp_path / "deltas", opened.archive.store, max_bytes=0, metrics=metrics)
    fetching = Fetching(
        opened.archive, control, deltas, metrics, Limits(max_fetches=1, stall_s=CALL_S, keepalive_s=0.001)
    )
    async with aclosing(fetching._answer(asking(1))) as first, aclosing(fetching._answer(asking(1))) as second:
        assert (await anext(first)).HasField("start")
        assert (await anext(first)).chunk.data
        assert (await anext(second)).HasField("start")
        for _ in range(3):
            assert (await anext(second)) == pb.FetchResponse(chunk=pb.Chunk())
        await first.aclose()
        while not (response := await anext(second)).chunk.data:
            pass
        assert response.chunk.data == weights(1).data[: rpc.CHUNK_BYTES]
    for part in (fetching, deltas, opened):
        part.close()
    control.join()
