"""What a client may hold is bounded: connections, requests, bodies, and answers that it does not read."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import openai
import pytest
from tests.support.fake_engine import FakeEngine
from tests.support.inference import MODEL, RunningPod, running_pod
from tests.support.wait import until

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@asynccontextmanager
async def connection(pod: RunningPod) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = pod.url.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what this end does not read stays with the other
    sock.settimeout(0)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@pytest.mark.attack(
    boundary="client",
    attack="a connection that sends nothing, or half a request",
    outcome="it is closed after the stall time",
)
@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"Content-Length: 2\r\n"], ids=["nothing", "half a head", "more"])
async def test_a_connection_that_sends_no_request_is_closed(tmp_path: Path, sent: bytes) -> None:
    async with running_pod(tmp_path, stall_seconds=0.1) as pod, connection(pod) as (reader, writer):
        writer.write(sent)
        assert await reader.read() == b""


@pytest.mark.attack(
    boundary="client",
    attack="a head that trickles in, byte by byte",
    outcome="it is closed all the same",
)
async def test_bytes_that_trickle_in_win_no_time(tmp_path: Path) -> None:
    async with running_pod(tmp_path, stall_seconds=0.2) as pod, connection(pod) as (reader, writer):
        writer.write(HEAD)

        def is_closed_in_spite_of_one_more_byte() -> bool:
            if not writer.is_closing():
                writer.write(b"x")
            # A byte that crosses the end on its way turns the end into a reset.
            return reader.at_eof() or reader.exception() is not None

        await until(is_closed_in_spite_of_one_more_byte)


async def test_a_second_request_on_a_connection_has_the_same_time(tmp_path: Path) -> None:
    async with running_pod(tmp_path, stall_seconds=0.1) as pod, connection(pod) as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.read()).endswith(b"ok\n"), "answered, and closed after a while"


@pytest.mark.attack(boundary="client", attack="a body that never comes", outcome="408, and its place is free")
async def test_a_body_that_does_not_come_is_408(tmp_path: Path) -> None:
    async with running_pod(tmp_path, stall_seconds=0.1) as pod, connection(pod) as (reader, writer):
        writer.write(HEAD + b"Content-Length: 100\r\n\r\n{")
        answer = await reader.read()

    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code":"body_too_slow"' in answer


@pytest.mark.attack(
    boundary="client",
    attack="a streamed answer that nobody reads",
    outcome="the request is cancelled and its slot is free",
)
async def test_a_stream_that_nobody_reads_is_cancelled(tmp_path: Path) -> None:
    name = "m" * 50_000  # in each event, so that a few of them fill the kernel's buffers
    engine = FakeEngine(max_context=10_000)
    async with (
        running_pod(tmp_path, engine, stall_seconds=0.2, served_model_name=name) as pod,
        connection(pod) as (
            _,
            writer,
        ),
    ):
        body = f'{{"model": "{name}", "prompt": "p", "max_tokens": 9000, "stream": true}}'.encode()
        writer.write(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await until(lambda: pod.engine.load.running == 1)

        await until(lambda: pod.engine.load.running == 0, what="the slot's freedom")
        await pod.counts("updraft_inference_hang_ups_total", 1)
        await pod.counts('updraft_inference_requests_total{finish="cancelled"}', 1)


@pytest.mark.attack(
    boundary="client",
    attack="more requests than allowed",
    outcome="429, while health checks and metrics are answered",
)
async def test_too_many_requests_are_429_while_probes_are_answered(tmp_path: Path) -> None:
    async with running_pod(tmp_path, max_connections=1) as pod:
        pod.engine.go.clear()
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(pod.complete())
            await until(lambda: pod.engine.load.running == 1)
            with pytest.raises(openai.RateLimitError, match="1 requests") as caught:
                await pod.openai.completions.create(model=MODEL, prompt="p")
            probes = [await pod.http.get(path) for path in ("/healthz", "/readyz", "/metrics")]
            pod.engine.go.set()

    assert caught.value.response.headers["retry-after"] == "1"
    assert [probe.status_code for probe in probes] == [200, 200, 200]
    assert running.result().status_code == 200


async def test_bodies_that_are_still_read_count_too(tmp_path: Path) -> None:
    async with running_pod(tmp_path, max_connections=1) as pod, connection(pod) as (_, writer):
        writer.write(HEAD + b"Content-Length: 100\r\n\r\n{")

        async def is_full() -> bool:
            return (await pod.complete()).status_code == 429

        await until(is_full)


@pytest.mark.attack(
    boundary="client",
    attack="more idle connections than allowed",
    outcome="the oldest without a request is closed; health checks and running requests go on",
)
async def test_too_many_connections_push_out_the_oldest_that_has_no_request(tmp_path: Path) -> None:
    async with running_pod(tmp_path, max_connections=2) as pod, AsyncExitStack() as stack:
        pod.engine.go.clear()
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(pod.complete())
            await until(lambda: pod.engine.load.running == 1)
            first, _ = await stack.enter_async_context(connection(pod))
            last = [await stack.enter_async_context(connection(pod)) for _ in range(80)][-1][0]

            assert await first.read() == b""
            assert (await pod.http.get("/healthz")).status_code == 200
            assert not last.at_eof()
            pod.engine.go.set()
    assert running.result().status_code == 200, "a connection with a request stays"
