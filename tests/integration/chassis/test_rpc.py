import asyncio
import gc
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import grpc
import grpc.aio
import pytest
from tests.support.ports import free_port
from tests.support.rpc import listening, service, serving
from tests.support.wait import LONG_S

from updraft.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1 import registry_pb2_grpc
from updraft_chassis import errors, rpc

REGISTRY = pb.DESCRIPTOR.services_by_name["Registry"]
FLEET = fleet_pb2.DESCRIPTOR.services_by_name["Fleet"]

KINDS = [errors.UpdraftError, *errors.UpdraftError.__subclasses__()]


def failing(error: Exception) -> tuple[grpc.GenericRpcHandler, grpc.GenericRpcHandler]:
    """One method of each of the four kinds; every one raises `error`, the streaming ones after one answer."""

    async def get(request: pb.GetRequest, context: Any) -> pb.GetResponse:
        raise error

    async def watch(request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:
        yield pb.WatchResponse()
        raise error

    async def publish(requests: AsyncIterator[pb.PublishRequest], context: Any) -> pb.PublishResponse:
        async for _ in requests:
            raise error
        raise AssertionError

    async def connect(
        reports: AsyncIterator[fleet_pb2.ConnectRequest], context: Any
    ) -> AsyncIterator[fleet_pb2.ConnectResponse]:
        async for _ in reports:
            yield fleet_pb2.ConnectResponse()
            raise error

    return service(REGISTRY, Get=get, Watch=watch, Publish=publish), service(FLEET, Connect=connect)


async def call_all_kinds(channel: grpc.aio.Channel) -> list[Exception]:
    """Call each method; return what the client saw."""
    registry: registry_pb2_grpc.RegistryAsyncStub = registry_pb2_grpc.RegistryStub(channel)
    fleet: fleet_pb2_grpc.FleetAsyncStub = fleet_pb2_grpc.FleetStub(channel)
    answers = (
        registry.Watch(pb.WatchRequest(), timeout=LONG_S),
        fleet.Connect(iter([fleet_pb2.ConnectRequest()]), timeout=LONG_S),
    )
    return [
        await seen(registry.Get(pb.GetRequest(), timeout=LONG_S)),
        await seen(registry.Publish(iter([pb.PublishRequest()]), timeout=LONG_S)),
        *[await seen(exhaust(stream)) for stream in answers],
    ]


async def seen(call: Awaitable[object]) -> Exception:
    with pytest.raises(errors.UpdraftError) as raised, rpc.errors():
        await call
    return raised.value


async def exhaust(answers: AsyncIterable[object]) -> None:
    async for _ in answers:
        pass


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_of_the_tree_arrives_as_itself_from_all_four_kinds_of_method(
    kind: type[errors.UpdraftError], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(*failing(kind("version 7 is away: try 6"))) as channel:
        statuses = await call_all_kinds(channel)
    assert [type(error) for error in statuses] == [kind] * 4
    assert {str(error) for error in statuses} == {"version 7 is away: try 6"}
    assert [record for record in caplog.records if record.name == "updraft_chassis.rpc"] == []


@pytest.mark.attack(
    boundary="text",
    attack="reading secrets from the text of an internal error",
    outcome="clients get no text of it",
)
async def test_the_text_of_an_unknown_error_stays_in_the_servers_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(*failing(KeyError("password"))) as channel:
        statuses = await call_all_kinds(channel)
    assert [type(error) for error in statuses] == [errors.UpdraftError] * 4
    assert not any("password" in str(error) for error in statuses)
    logged = [record for record in caplog.records if record.name == "updraft_chassis.rpc"]
    assert len(logged) == 4
    assert all(record.levelno == logging.ERROR and record.exc_info for record in logged)


async def test_the_servers_wish_when_to_try_again_arrives() -> None:
    async with serving(*failing(errors.Unavailable("busy", retry_after_s=1.5))) as channel:
        statuses = await call_all_kinds(channel)
    assert [error.retry_after_s for error in statuses if isinstance(error, errors.Unavailable)] == [1.5] * 4


async def test_a_status_that_the_servicer_chose_itself_is_kept() -> None:
    async def get(request: pb.GetRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.GetResponse:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "too far")

    async with serving(service(REGISTRY, Get=get)) as channel:
        stub: registry_pb2_grpc.RegistryAsyncStub = registry_pb2_grpc.RegistryStub(channel)
        with pytest.raises(errors.InvalidInput, match="too far"), rpc.errors():
            await stub.Get(pb.GetRequest(), timeout=LONG_S)


async def test_a_sentence_of_any_length_and_script_arrives() -> None:
    async with serving(*failing(errors.Conflict("\u00e9" * 100_000))) as channel:
        statuses = await call_all_kinds(channel)
    assert [type(error) for error in statuses] == [errors.Conflict] * 4


async def test_an_unknown_method_is_unimplemented_and_no_crash() -> None:
    async with serving() as channel:
        stub: registry_pb2_grpc.RegistryAsyncStub = registry_pb2_grpc.RegistryStub(channel)
        with pytest.raises(errors.UpdraftError, match="not found"), rpc.errors():
            await stub.Get(pb.GetRequest(), timeout=LONG_S)


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    async with rpc.channel(f"127.0.0.1:{free_port()}") as channel:
        stub: registry_pb2_grpc.RegistryAsyncStub = registry_pb2_grpc.RegistryStub(channel)
        with pytest.raises(errors.Unavailable), rpc.errors():
            await stub.Get(pb.GetRequest(), timeout=LONG_S)


async def test_a_server_that_does_not_answer_in_time_is_unavailable() -> None:
    async def get(request: pb.GetRequest, context: Any) -> pb.GetResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async with serving(service(REGISTRY, Get=get)) as channel:
        stub: registry_pb2_grpc.RegistryAsyncStub = registry_pb2_grpc.RegistryStub(channel)
        with pytest.raises(errors.Unavailable), rpc.errors():
            await stub.Get(pb.GetRequest(), timeout=0.1)


async def test_a_message_beyond_the_limit_is_refused_and_one_below_is_not() -> None:
    async def get(request: pb.GetRequest, context: Any) -> pb.GetResponse:
        return pb.GetResponse(version=pb.Version(reason="x" * request.version))

    async with serving(service(REGISTRY, Get=get)) as channel:
        stub: registry_pb2_grpc.RegistryAsyncStub = registry_pb2_grpc.RegistryStub(channel)
        answer = await stub.Get(pb.GetRequest(version=rpc.MAX_MESSAGE_BYTES - 100), timeout=LONG_S)
        assert len(answer.version.reason) == rpc.MAX_MESSAGE_BYTES - 100
        with pytest.raises(errors.Exhausted, match="larger than max"), rpc.errors():
            await stub.Get(pb.GetRequest(version=rpc.MAX_MESSAGE_BYTES), timeout=LONG_S)


async def test_a_taken_port_is_told_in_one_sentence() -> None:
    first, second = rpc.server(), rpc.server()
    port = rpc.bind(first, host="127.0.0.1", port=0, setting="UPDRAFT_REGISTRY_PORT")
    await first.start()
    with pytest.raises(errors.Conflict, match=f"cannot listen on 127.0.0.1:{port}.*set UPDRAFT_REGISTRY_PORT"):
        rpc.bind(second, host="127.0.0.1", port=port, setting="UPDRAFT_REGISTRY_PORT")
    await first.stop(grace=None)
    await second.stop(grace=None)


@pytest.mark.parametrize("pause_after", [1, None], ids=["falls silent", "sends for ever"])
@pytest.mark.parametrize(
    ("refusal", "drain_s"),
    [(errors.InvalidInput("this cannot be"), 0.1), (errors.Unauthenticated("who are you"), 60.0)],
    ids=["a caller", "a stranger"],
)
async def test_a_sender_that_does_not_end_hears_its_refusal_within_a_limit(
    pause_after: int | None, refusal: errors.UpdraftError, drain_s: float
) -> None:
    has_heard = asyncio.Event()

    async def publish(requests: AsyncIterator[pb.PublishRequest], context: Any) -> pb.PublishResponse:
        raise refusal

    async def sent() -> AsyncIterator[pb.PublishRequest]:
        for n in count():
            if n == pause_after:
                await has_heard.wait()
            yield pb.PublishRequest()

    server = grpc.aio.server(interceptors=[rpc.ErrorsToStatus(drain_s=drain_s)])
    server.add_generic_rpc_handlers([service(REGISTRY, Publish=publish)])
    port = rpc.bind(server, host="127.0.0.1", port=0, setting="none")
    await server.start()
    for _ in range(3):  # now and then grpc.aio's client loses what it is told while it writes (grpc#36066)
        has_heard.clear()
        async with rpc.channel(f"127.0.0.1:{port}") as channel:
            stub: registry_pb2_grpc.RegistryAsyncStub = registry_pb2_grpc.RegistryStub(channel)
            status = await seen(stub.Publish(sent(), timeout=20))
            has_heard.set()
        if "Internal error from Core" not in str(status):
            break
    await server.stop(grace=None)
    assert type(status) is type(refusal)


async def test_a_channel_finds_a_server_that_comes_back() -> None:
    async def get(request: pb.GetRequest, context: Any) -> pb.GetResponse:
        return pb.GetResponse()

    server = rpc.server()
    server.add_generic_rpc_handlers([service(REGISTRY, Get=get)])
    port = rpc.bind(server, host="127.0.0.1", port=0, setting="none")
    await server.start()
    async with rpc.channel(f"127.0.0.1:{port}") as channel:
        stub: registry_pb2_grpc.RegistryAsyncStub = registry_pb2_grpc.RegistryStub(channel)
        await stub.Get(pb.GetRequest(), timeout=LONG_S)
        await server.stop(grace=None)
        with pytest.raises(errors.Unavailable), rpc.errors():
            await stub.Get(pb.GetRequest(), timeout=LONG_S)
        again = rpc.server()
        again.add_generic_rpc_handlers([service(REGISTRY, Get=get)])
        rpc.bind(again, host="127.0.0.1", port=port, setting="none")
        await again.start()
        await stub.Get(pb.GetRequest(), timeout=LONG_S, wait_for_ready=True)
        await again.stop(grace=None)


@asynccontextmanager
async def slow_to_connect(address: str) -> AsyncIterator[str]:
    """Another address of that server, where a connection says nothing for half a second."""
    host, port = address.split(":")

    async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            target.write(data)
        target.close()

    async def link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        server_reader, server_writer = await asyncio.open_connection(host, int(port))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(forward(reader, server_writer))
            tasks.create_task(forward(server_reader, writer))

    async with await asyncio.start_server(link, "127.0.0.1", 0) as proxy:
        yield f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"


async def test_a_server_that_is_slow_to_connect_to_is_waited_for() -> None:
    async def get(request: pb.GetRequest, context: Any) -> pb.GetResponse:
        return pb.GetResponse()

    async with (
        listening(service(REGISTRY, Get=get)) as address,
        slow_to_connect(address) as slow,
        rpc.channel(slow) as channel,
    ):
        stub: registry_pb2_grpc.RegistryAsyncStub = registry_pb2_grpc.RegistryStub(channel)
        await stub.Get(pb.GetRequest(), timeout=LONG_S)


async def test_a_streaming_method_cleans_up_when_its_caller_leaves() -> None:
    cleaned_up = asyncio.Event()

    async def watch(request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:
        try:
            while True:
                yield pb.WatchResponse()
        finally:
            cleaned_up.set()

    async with serving(service(REGISTRY, Watch=watch)) as channel:
        stub: registry_pb2_grpc.RegistryAsyncStub = registry_pb2_grpc.RegistryStub(channel)
        call = stub.Watch(pb.WatchRequest(), timeout=LONG_S)
        await call.read()
        call.cancel()
        async with asyncio.timeout(LONG_S):
            await cleaned_up.wait()


async def test_a_method_may_answer_without_reading_its_requests(recwarn: pytest.WarningsRecorder) -> None:
    async def connect(_: Any, context: Any) -> AsyncIterator[fleet_pb2.ConnectResponse]:
        yield fleet_pb2.ConnectResponse()

    async with serving(service(FLEET, Connect=connect)) as channel:
        stub: fleet_pb2_grpc.FleetAsyncStub = fleet_pb2_grpc.FleetStub(channel)
        await exhaust(stub.Connect(timeout=LONG_S))
    gc.collect()

    assert [str(warning.message) for warning in recwarn] == []
