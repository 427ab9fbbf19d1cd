"""The clients' port with TLS: certificates that are renewed under a stream, and clients that are slow before they can ask."""

import asyncio
import gc
import select
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.certificates import Authority
from tests.support.fake_engine import FakeEngine
from tests.support.inference import MODEL, RunningPod, running_pod
from tests.support.mounts import Mount
from tests.support.wait import LONG_S, until

from updraft_chassis.errors import InvalidInput
from updraft_inference.http.handshakes import Handshakes
from updraft_inference.settings import InferenceSettings


class Certificate:
    """Files of a pod's certificate, as a kubelet keeps them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mount = Mount(folder / "mount")
        self._num = 0
        self.believes = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        """Trusts what was issued so far."""
        self.settings: dict[str, Any] = {
            f"tls_{name}_file": folder / "mount" / f"tls.{end}" for name, end in _ENDS.items()
        }
        self.renew()

    def renew(self) -> Authority:
        """Replace it by one of another CA, which is returned."""
        self._num += 1
        authority = Authority(self._folder / str(self._num))
        made = authority.server()
        self._mount.sync({"tls.crt": made.cert_file.read_text(), "tls.key": made.key_file.read_text()})
        self.believes.load_verify_locations(authority.file)
        return authority

    def spoil(self) -> None:
        self._mount.sync({"tls.crt": "none", "tls.key": "none"})


_ENDS = {"cert": "crt", "key": "key"}


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return Certificate(tmp_path / "certificate")


@asynccontextmanager
async def plain(pod: RunningPod) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which nothing is encrypted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(pod.url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def test_clients_that_believe_the_ca_are_answered(tmp_path: Path, certificate: Certificate) -> None:
    async with running_pod(tmp_path, believes=certificate.believes, **certificate.settings) as pod:
        assert (await pod.complete()).status_code == 200
        assert (await pod.http.get("/metrics")).status_code == 200


@pytest.mark.attack(boundary="client", attack="plaintext to the clients' port with TLS", outcome="nothing is answered")
async def test_plaintext_is_not_answered(tmp_path: Path, certificate: Certificate) -> None:
    async with running_pod(tmp_path, believes=certificate.believes, **certificate.settings) as pod:
        async with plain(pod) as (reader, writer):
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"HTTP" not in await reader.read()
        assert (await pod.http.get("/healthz")).status_code == 200


def closed(clients: list[socket.socket]) -> list[socket.socket]:
    """Those that the server closed."""
    poll = select.poll()
    for each in clients:
        poll.register(each, select.POLLIN)
    ended = {number for number, _ in poll.poll(0)}
    return [each for each in clients if each.fileno() in ended]


@pytest.mark.attack(
    boundary="client",
    attack="connections that never finish their TLS handshake, however many",
    outcome="they are closed after the stall time, the oldest earlier; others are answered",
)
async def test_handshakes_are_limited_in_time_and_number(
    tmp_path: Path, certificate: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    limits: dict[str, Any] = {"stall_seconds": 600, "max_connections": 1}
    settings: dict[str, Any] = {"believes": certificate.believes, **certificate.settings}
    async with running_pod(tmp_path, **limits, **settings) as pod:
        address = ("127.0.0.1", int(pod.url.rpartition(":")[2]))
        burst = [socket.create_connection(address) for _ in range(300)]  # all at once: the server runs in this thread
        assert (await pod.complete()).status_code == 200
        await until(lambda: len(burst) - len(closed(burst)) <= 1 + 64, what="the end of the oldest")
        assert burst[-1] not in closed(burst), "the newest may go on"
        for each in burst:
            each.close()
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []
    async with running_pod(tmp_path, stall_seconds=0.2, **settings) as pod, plain(pod) as (reader, _):
        assert await reader.read() == b""


@pytest.mark.attack(
    boundary="client",
    attack="a streamed answer that nobody reads, over TLS",
    outcome="the request is cancelled and its slot is free",
)
async def test_a_stream_that_nobody_reads_is_cancelled(tmp_path: Path, certificate: Certificate) -> None:
    name = "m" * 50_000
    engine = FakeEngine(max_context=10_000)
    settings: dict[str, Any] = {"stall_seconds": 0.2, "served_model_name": name, **certificate.settings}
    async with running_pod(tmp_path, engine, believes=certificate.believes, **settings) as pod:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(0)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", int(pod.url.rpartition(":")[2])))
        _, writer = await asyncio.open_connection(
            sock=sock, ssl=certificate.believes, server_hostname="127.0.0.1", limit=1024
        )
        body = f'{{"model": "{name}", "prompt": "p", "max_tokens": 9000, "stream": true}}'.encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        writer.write(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await until(lambda: pod.engine.load.running == 1)
        await until(lambda: pod.engine.load.running == 0, what="the slot's freedom")
        writer.transport.abort()


async def test_the_end_is_quiet_though_an_idle_client_does_not_answer(
    tmp_path: Path, certificate: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_pod(tmp_path, believes=certificate.believes, **certificate.settings) as pod:
        client = await asyncio.to_thread(asked_once, pod, certificate)
    client.close()
    assert [record.message for record in caplog.records if record.name == "uvicorn.error"] == []


def asked_once(pod: RunningPod, certificate: Certificate) -> socket.socket:
    """A connection that was kept after an answer."""
    sock = socket.create_connection(("127.0.0.1", int(pod.url.rpartition(":")[2])))
    client = certificate.believes.wrap_socket(sock, server_hostname="127.0.0.1")
    client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.recv(4096).startswith(b"HTTP/1.1 200")
    return client


async def test_a_handshake_that_comes_after_the_end_is_cut_off(certificate: Certificate) -> None:
    cert, key = (certificate.settings[f"tls_{name}_file"] for name in _ENDS)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    handshakes = Handshakes(context, max_running=1, timeout_s=600)
    server = await asyncio.get_running_loop().create_server(handshakes.before(asyncio.Protocol), "127.0.0.1", 0)
    async with server:
        handshakes.close()
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        assert await reader.read() == b""
        writer.close()


async def test_a_renewed_certificate_is_shown_to_the_next_connection_and_breaks_no_stream(
    tmp_path: Path, certificate: Certificate
) -> None:
    async with running_pod(tmp_path, believes=certificate.believes, **certificate.settings) as pod:
        pod.engine.go.clear()
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(pod.complete())
            await until(lambda: pod.engine.load.running == 1)
            for _ in range(3):
                newest = certificate.renew()
                assert await is_believed(pod, newest)
            certificate.spoil()
            assert await is_believed(pod, newest), "what is not valid is not used"
            pod.engine.go.set()
    assert running.result().status_code == 200


async def is_believed(pod: RunningPod, authority: Authority) -> bool:
    """Whether a new client that trusts this CA alone is answered."""
    trusted = ssl.create_default_context(cafile=authority.file)
    async with httpx.AsyncClient(base_url=pod.url, verify=trusted, timeout=LONG_S) as client:
        return (await client.get("/healthz")).status_code == 200


async def test_a_certificate_that_is_none_is_refused_at_the_start(tmp_path: Path, certificate: Certificate) -> None:
    certificate.spoil()
    with pytest.raises(ExceptionGroup) as caught:
        async with running_pod(tmp_path, believes=certificate.believes, **certificate.settings):
            pass
    assert caught.group_contains(InvalidInput, match="not a PEM certificate and its key")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tls_cert_file": "c"}, "require each other"),
        ({"metrics_tls_cert_file": "c", "engine": "vllm"}, "require each other"),
        ({"metrics_tls_cert_file": "c", "metrics_tls_key_file": "k"}, "requires ENGINE"),
        ({"tls_cert_file": "c", "tls_key_file": "k", "engine": "vllm"}, "yours has its own port"),
    ],
)
def test_settings_with_which_the_port_would_speak_no_tls_are_refused(values: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InferenceSettings(model=MODEL, **values)  # type: ignore[arg-type] # by name
