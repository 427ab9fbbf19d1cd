"""Everything that a registry, a trainer and an operator listen on, found by looking, and what a stranger gets there."""

import asyncio
import http.client
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc.aio
import psutil
import pytest
from tests.support.checkpoints import draft
from tests.support.registry import CALL_S, RegistryProcess, publish, registry_stub

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_chassis import rpc
from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import Unauthenticated

PERSON = "token-of-a-person-0123456789"
SERVICES = (registry_pb2.DESCRIPTOR.services_by_name["Registry"], fleet_pb2.DESCRIPTOR.services_by_name["Fleet"])


@pytest.fixture
def process(tmp_path: Path) -> Iterator[RegistryProcess]:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"operate:{PERSON}\n")
    with RegistryProcess(tmp_path, tokens_file=tokens) as registry:
        yield registry


def listening(pid: int) -> set[int]:
    connections = psutil.Process(pid).net_connections(kind="inet")
    return {each.laddr.port for each in connections if each.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)}


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=CALL_S)
    connection.request("GET", path)
    response = connection.getresponse()
    answer = response.status, response.read().decode()
    connection.close()
    return answer


@pytest.mark.attack(
    boundary="ports",
    attack="an unauthenticated peer on every port on which a registry listens",
    outcome="there are two: gRPC refuses each method, and the other answers metrics and health only",
)
async def test_a_stranger_gets_metrics_and_health_and_nothing_else(process: RegistryProcess, tmp_path: Path) -> None:
    assert listening(process.pid) == {process.port, process.metrics_port}
    token = tmp_path / "token"
    token.write_text(PERSON)
    async with rpc.channel(process.address, Credentials(token_file=token)) as known:
        await publish(registry_stub(known), draft(1), speculator="a-secret-project")

    async with grpc.aio.insecure_channel(process.address) as stranger:
        for method in (method for service in SERVICES for method in service.methods):
            assert method.containing_service is not None
            await refused(stranger, f"/{method.containing_service.full_name}/{method.name}")
        reflection: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
        reflection = stranger.unary_unary("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await reflection(b"", timeout=CALL_S)
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED

    assert [get(process.metrics_port, path)[0] for path in ("/metrics", "/healthz", "/readyz")] == [200, 200, 200]
    for path in ("/", "/debug/pprof", "/metrics/../../etc/passwd", "/../registry/catalogue.db", "/%2e%2e/tokens"):
        status, text = get(process.metrics_port, path)
        assert (status, text) == (404, "available: /metrics, /healthz, /readyz\n")
    assert PERSON not in get(process.metrics_port, "/metrics")[1]


async def refused(channel: grpc.aio.Channel, method: str) -> None:
    """Without a token, whatever kind of method it is: the status comes first."""
    with pytest.raises(Unauthenticated, match="the call has none"), rpc.errors():
        await answered(channel.stream_stream(method)(timeout=CALL_S))


async def answered(call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> None:
    await call.write(b"")
    await call.done_writing()
    await call.read()
    raise await error_of(call)


async def error_of(call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> grpc.aio.AioRpcError:
    """What a stream ended with, which a read at its end does not raise."""
    return grpc.aio.AioRpcError(
        await call.code(), grpc.aio.Metadata(), await call.trailing_metadata(), await call.details()
    )


@pytest.mark.attack(
    boundary="registry",
    attack="hundreds of connections that never finish their handshake, or send one byte",
    outcome="calls of others are answered",
)
@pytest.mark.parametrize("sent", [b"", b"PRI * HTT"], ids=["nothing", "half a preface"])
async def test_connections_without_a_handshake_hinder_nobody(
    process: RegistryProcess, tmp_path: Path, sent: bytes
) -> None:
    token = tmp_path / "token"
    token.write_text(PERSON)
    with ExitStack() as held:
        for _ in range(300):
            connection = held.enter_context(socket.create_connection(("127.0.0.1", process.port), timeout=CALL_S))
            connection.sendall(sent)
        async with asyncio.timeout(CALL_S), rpc.channel(process.address, Credentials(token_file=token)) as known:
            assert (await publish(registry_stub(known), draft(1))).version.version == 1
