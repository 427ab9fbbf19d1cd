"""The pod's stream to a registry that refuses it, goes away and comes back."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from tests.support.inference import running_pod
from tests.support.ports import free_port
from tests.support.rpc import listening, service
from tests.support.wait import until

from updraft.fleet.v1 import fleet_pb2
from updraft.fleet.v1.fleet_pb2_grpc import FleetStub
from updraft_chassis import rpc
from updraft_chassis.access import Access, Tokens
from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import InvalidInput
from updraft_inference.agent.fleet import FleetLink, LinkState

FLEET = fleet_pb2.DESCRIPTOR.services_by_name["Fleet"]
READER, POD = "token-of-a-reader", "token-of-this-pod"


async def connect(reports: AsyncIterator[fleet_pb2.ConnectRequest], context: Any) -> AsyncIterator[Any]:
    """A registry that answers each report."""
    async for request in reports:
        yield fleet_pb2.ConnectResponse(directive=fleet_pb2.Directive(nonce=request.report.identity.pod))


async def refuse(reports: AsyncIterator[fleet_pb2.ConnectRequest], _: Any) -> AsyncIterator[Any]:
    """A registry whose pods serve another target than this one."""
    yield fleet_pb2.ConnectResponse()
    async for _ in reports:
        raise InvalidInput("pod-0 cannot serve chat: it has another target")


class Crossed:
    """A stub whose first calls end while the client sends: grpc.aio loses then what it was told (grpc#36066)."""

    def __init__(self, channel: grpc.aio.Channel, times: int) -> None:
        self._connect = FleetStub(channel).Connect
        self._times = times

    def Connect(self) -> Any:  # noqa: N802 - the service's name for it
        call: Any = self._connect()
        if self._times:
            self._times -= 1
            call.write = self._lose
        return call

    async def _lose(self, _: fleet_pb2.ConnectRequest) -> None:
        details = 'Failed "execute_batch": (SendMessageOperation,)'
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(f"read:{READER}\nserve:{POD}\n")
    return file


def bearing(folder: Path, token: str) -> Credentials:
    file = folder / "token"
    file.write_text(token)
    return Credentials(token_file=file)


@asynccontextmanager
async def linked(
    channel: grpc.aio.Channel, *, report_s: float = 0.05, breaks_off: int = 0
) -> AsyncIterator[list[LinkState]]:
    """A link on this channel, whose first streams break off if so asked; yields what it says of itself."""
    heard: list[LinkState] = []
    stub: Any = Crossed(channel, times=breaks_off)
    link = FleetLink(
        stub,
        lambda: fleet_pb2.PodReport(identity=fleet_pb2.PodIdentity(pod="pod-0")),
        lambda directive: None,
        changed=asyncio.Event(),
        on_link=heard.append,
        report_s=report_s,
    )
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(link.run())
        yield heard
        task.cancel()


async def test_a_pod_whose_role_does_not_do_says_why_once_and_connects_once_its_token_does(
    tokens_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    credentials = bearing(tmp_path, READER)
    async with (
        listening(service(FLEET, Connect=connect), access=Access(Tokens(tokens_file))) as address,
        rpc.channel(address, credentials) as channel,
        linked(channel) as heard,
    ):
        await until(lambda: heard.count(LinkState.DENIED) >= 2, what="two refusals")
        assert set(heard) == {LinkState.DENIED}

        bearing(tmp_path, POD)
        await until(lambda: LinkState.UP in heard, what="the connection")

    records = [record for record in caplog.records if record.name == "updraft_inference.agent.fleet"]
    assert [record.message for record in records] == [
        "The registry refuses this pod; serving goes on",
        "The registry is back",
    ]
    assert "role read may not call Fleet.Connect, which requires role serve or operate" in str(vars(records[0]))
    assert not any(token in str(vars(record)) for record in caplog.records for token in (READER, POD))


async def test_a_pod_that_serves_another_target_is_refused_and_not_told_that_the_registry_is_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        listening(service(FLEET, Connect=refuse)) as address,
        rpc.channel(address) as channel,
        linked(channel, report_s=60.0) as heard,  # one that is refused while it sends may not hear why (grpc#36066)
    ):
        await until(lambda: len(heard) >= 2, what="two refusals")

    assert set(heard) == {LinkState.UP, LinkState.DENIED}
    records = [record for record in caplog.records if record.name == "updraft_inference.agent.fleet"]
    assert records[0].message == "The registry refuses this pod; serving goes on"
    assert "it has another target" in str(vars(records[0]))


@pytest.mark.parametrize(
    ("times", "links"), [(1, {LinkState.UP, LinkState.DENIED}), (2, {LinkState.AWAY, LinkState.UP, LinkState.DENIED})]
)
async def test_a_refusal_that_is_lost_once_is_heard_before_anything_is_said(times: int, links: set[LinkState]) -> None:
    async with (
        listening(service(FLEET, Connect=refuse)) as address,
        rpc.channel(address) as channel,
        linked(channel, report_s=60.0, breaks_off=times) as heard,
    ):
        await until(lambda: LinkState.DENIED in heard, what="the refusal")

    assert set(heard) == links


async def test_a_registry_that_is_away_is_told_once_and_so_is_its_return(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    port = free_port()
    async with rpc.channel(f"127.0.0.1:{port}") as channel, linked(channel) as heard:
        await until(lambda: heard.count(LinkState.AWAY) >= 3, what="three attempts")
        server = rpc.server()
        server.add_generic_rpc_handlers([service(FLEET, Connect=connect)])
        rpc.bind(server, host="127.0.0.1", port=port, setting="none")
        await server.start()
        await until(lambda: LinkState.UP in heard, what="the connection")
        await server.stop(grace=None)
        await until(lambda: heard[-1] is LinkState.AWAY, what="the end of the stream")

    records = [record.message for record in caplog.records if record.name == "updraft_inference.agent.fleet"]
    away = "The registry is away; serving goes on"
    assert records == [away, "The registry is back", away]


async def compare(reports: AsyncIterator[fleet_pb2.ConnectRequest], _: Any) -> AsyncIterator[Any]:
    """A registry in which a canary runs."""
    async for _ in reports:
        yield fleet_pb2.ConnectResponse(directive=fleet_pb2.Directive(nonce="compare", comparing=True))


async def test_a_pod_compares_drafts_for_as_long_as_its_registry_says_so(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(listening(service(FLEET, Connect=compare)))
        async with running_pod(tmp_path, registry_address=address) as pod:
            await until(lambda: pod.engine.is_comparing, what="the comparison")
            await stack.aclose()
            await until(lambda: not pod.engine.is_comparing, what="its end without a registry")
