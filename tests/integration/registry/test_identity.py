"""A registry whose callers are ServiceAccounts of a cluster: real tokens over real gRPC."""

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from tests.support.certificates import Authority
from tests.support.checkpoints import draft
from tests.support.registry import PodStream, Registry, publish, registry_stub, running
from tests.support.service_accounts import (
    ACCOUNTS,
    AUDIENCE,
    ISSUER,
    OPERATOR,
    SERVING,
    TRAINER,
    SigningKey,
    key_set,
    write_key_set,
)
from tests.support.wait import until

from updraft.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import Forbidden, Unauthenticated, Unavailable
from updraft_inference.agent.fleet import FleetLink, LinkState
from updraft_registry.identity.service_accounts import LEEWAY_S

KEY = SigningKey("signing-key")
STATIC = "a-static-token-of-a-person"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    registry: Registry
    folder: Path

    def bearing(self, token: str, name: str = "token") -> Credentials:
        """Credentials from a token file, which this call writes or exchanges."""
        file, new = self.folder / name, self.folder / f"{name}.new"
        new.write_text(token)
        new.replace(file)
        return Credentials(token_file=file)

    @asynccontextmanager
    async def channel(self, token: str, name: str = "token") -> AsyncIterator[grpc.aio.Channel]:
        async with rpc.channel(self.registry.address, self.bearing(token, name)) as channel:
            yield channel


@asynccontextmanager
async def guarded(folder: Path, **settings: Any) -> AsyncIterator[Guarded]:
    keys = write_key_set(folder / "jwks", KEY)
    given = {"issuer": ISSUER, "audience": AUDIENCE, "accounts": ACCOUNTS, "key_set": str(keys), **settings}
    async with running(folder, **given) as registry:
        yield Guarded(registry=registry, folder=folder)


def expiring(valid_s: int, account: str = SERVING, **more: Any) -> str:
    """A token that the registry accepts for about so many seconds more."""
    return KEY.token(account, expires_s=valid_s - LEEWAY_S, **more)


async def listed(channel: grpc.aio.Channel) -> None:
    with rpc.errors():
        await registry_stub(channel).List(pb.ListRequest(speculator="default"), timeout=30)


@pytest.mark.attack(
    boundary="registry",
    attack="a trainer's token used for pods, and a pod's for rollouts",
    outcome="FORBIDDEN",
)
async def test_each_part_may_do_its_work_and_no_other(tmp_path: Path) -> None:
    async with guarded(tmp_path) as on:
        async with on.channel(KEY.token(TRAINER)) as trainer:
            await publish(registry_stub(trainer), draft(seed=1))
            with pytest.raises(Forbidden, match=r"role publish may not call Fleet\.Connect"):
                await connected(trainer)
        async with on.channel(KEY.token(SERVING, pod="pod-0")) as pod:
            await connected(pod)
            with pytest.raises(Forbidden, match=r"role serve may not call Registry\.Pause"), rpc.errors():
                await registry_stub(pod).Pause(pb.PauseRequest(speculator="default"), timeout=30)
        async with on.channel(KEY.token(OPERATOR)) as operator:
            with rpc.errors():
                await registry_stub(operator).Pause(pb.PauseRequest(speculator="default"), timeout=30)
        async with on.channel(KEY.token("other:qwen-serving")) as stranger:
            with pytest.raises(Unauthenticated, match="'other:qwen-serving' has no role in this registry"):
                await listed(stranger)


async def connected(channel: grpc.aio.Channel, name: str = "pod-0") -> PodStream:
    stream = PodStream(channel, name)
    await stream.report()
    await stream.receive()
    return stream


async def test_static_tokens_and_service_accounts_may_call_side_by_side(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"read:{STATIC}\n")
    async with guarded(tmp_path, tokens_file=tokens) as on:
        for token in (STATIC, KEY.token(SERVING)):
            async with on.channel(token) as channel:
                await listed(channel)
        async with on.channel("another-static-token") as channel:
            with pytest.raises(Unauthenticated, match="the call's token is unknown"):
                await listed(channel)


@pytest.mark.attack(boundary="evidence", attack="a pod that reports as another pod", outcome="FORBIDDEN")
async def test_a_pod_cannot_report_for_another_pod(tmp_path: Path) -> None:
    async with guarded(tmp_path) as on, on.channel(KEY.token(SERVING, pod="qwen-serving-a")) as channel:
        await connected(channel, "qwen-serving-a")
        with pytest.raises(Forbidden, match=r"the token belongs to pod qwen-serving-a, .* from qwen-serving-b"):
            await connected(channel, "qwen-serving-b")


@pytest.mark.attack(
    boundary="registry",
    attack="a stream that outlives its token",
    outcome="it ends, and the next call is refused",
)
@pytest.mark.parametrize("kind", ["watch", "pod"])
async def test_a_stream_ends_with_its_token_and_the_next_call_is_refused(kind: str, tmp_path: Path) -> None:
    async with guarded(tmp_path) as on, on.channel(expiring(2)) as channel:
        with pytest.raises(Unavailable, match="the token of this call has expired; call again with a new one"):
            await (watched(channel) if kind == "watch" else held(channel))
        with pytest.raises(Unauthenticated, match="token has expired"):
            await listed(channel)

        on.bearing(KEY.token())
        await listed(channel)


async def watched(channel: grpc.aio.Channel) -> None:
    """A watch, until it ends."""
    with rpc.errors():
        async for _ in registry_stub(channel).Watch(pb.WatchRequest(speculator="default"), timeout=60):
            pass


async def held(channel: grpc.aio.Channel) -> None:
    """A pod's stream, until it ends."""
    stream = await connected(channel)
    while True:
        await stream.receive()


async def test_a_pod_whose_stream_ended_with_its_token_counts_as_connected_because_it_calls_again(
    tmp_path: Path,
) -> None:
    async with (
        guarded(tmp_path) as on,
        on.channel(expiring(2)) as channel,
        on.channel(KEY.token(OPERATOR), "operator") as operator,
    ):
        await publish(registry_stub(operator), draft(seed=1))
        with pytest.raises(Unavailable, match="has expired"):
            await held(channel)
        assert await num_connected(operator) == 1

        on.bearing(KEY.token())
        (await connected(channel)).cancel()

        async def is_gone() -> bool:
            return await num_connected(operator) == 0

        await until(is_gone, what="a pod without a stream")


async def num_connected(channel: grpc.aio.Channel) -> int:
    with rpc.errors():
        answer = await registry_stub(channel).List(pb.ListRequest(speculator="default"), timeout=30)
    return answer.speculators[0].pods.connected


async def test_a_pod_whose_token_is_renewed_again_and_again_stays_connected_and_misses_no_directive(
    tmp_path: Path,
) -> None:
    """As a kubelet does it: the file is exchanged before its token expires, and the stream goes on with the next one."""
    links: list[LinkState] = []
    directives: list[fleet_pb2.Directive] = []
    pods: set[int] = set()
    async with (
        guarded(tmp_path) as on,
        on.channel(expiring(3, pod="pod-0")) as channel,
        on.channel(KEY.token(OPERATOR), "operator") as operator,
    ):
        streams, operate = Streams(channel), registry_stub(operator)
        link = FleetLink(
            streams,  # type: ignore[arg-type] # as much of the stub as is used
            lambda: fleet_pb2.PodReport(identity=PodStream(channel, "pod-0").identity),
            directives.append,
            changed=asyncio.Event(),
            on_link=links.append,
            report_s=0.2,
        )

        async def kubelet() -> None:
            while True:
                on.bearing(expiring(3, pod="pod-0"))
                await asyncio.sleep(0.5)

        async def watch() -> None:
            async for answer in operate.Watch(pb.WatchRequest(speculator="default")):
                pods.add(answer.state.pods.connected)

        await publish(operate, draft(seed=1))
        async with asyncio.TaskGroup() as tasks:
            running_tasks = [tasks.create_task(work) for work in (link.run(), kubelet(), watch())]
            await until(lambda: 1 in pods, what="the pod's first report")
            pods.clear()
            while streams.number < 4:
                reason = f"{len(directives)} directives later"
                await operate.Pin(pb.PinRequest(speculator="default", version=0, reason=reason), timeout=30)
                await until(partial(is_last, directives, reason), what="the directive of the last pin")
            for task in running_tasks:
                task.cancel()
        assert set(links) == {LinkState.UP}
        assert pods == {1}
        assert on.registry.metric('updraft_registry_denied_calls_total{status="UNAUTHENTICATED"}') == 0


def is_last(directives: Sequence[fleet_pb2.Directive], reason: str) -> bool:
    return reason in directives[-1].reason


class Streams:
    """A fleet stub that counts its streams."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = fleet_pb2_grpc.FleetStub(channel)
        self.number = 0

    def Connect(self) -> Any:  # noqa: N802 - the service's name for it
        self.number += 1
        return self._stub.Connect()


class ApiServer:
    """An API server's /openid/v1/jwks, over TLS and only for a pod's own token."""

    TOKEN = "token-of-the-registry-for-the-api-server"  # noqa: S105 - of this test

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder / "cluster")
        self.keys = key_set(KEY)
        self.requests: list[Mapping[str, str]] = []
        self.is_away = False
        self._tls = self.authority.server()

    @contextmanager
    def serve(self) -> Iterator[str]:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                api.requests.append(dict(self.headers.items()))
                is_allowed = self.headers["Authorization"] == f"Bearer {api.TOKEN}"
                self.send_response(503 if api.is_away else 200 if is_allowed else 403)
                self.end_headers()
                self.wfile.write(api.keys)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._tls.cert_file, self._tls.key_file)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_port}/openid/v1/jwks"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@pytest.fixture
def api_server(tmp_path: Path) -> ApiServer:
    (tmp_path / "api-token").write_text(f"{ApiServer.TOKEN}\n")
    return ApiServer(tmp_path)


async def test_the_keys_come_from_the_api_server_which_may_then_be_away(tmp_path: Path, api_server: ApiServer) -> None:
    with api_server.serve() as url:
        source = {"key_set": url, "key_set_ca_file": api_server.authority.file}
        async with guarded(tmp_path, **source, key_set_token_file=tmp_path / "api-token") as on:
            async with on.channel(KEY.token()) as known, on.channel(SigningKey("new").token(), "other") as unknown:
                await listed(known)
                api_server.is_away = True
                with pytest.raises(Unauthenticated, match="key 'new', which is not one of the cluster's"):
                    await listed(unknown)
                await listed(known)
            assert on.registry.metric('updraft_registry_key_fetches_total{result="ok"}') == 1
    assert len(api_server.requests) == 1


@pytest.mark.parametrize("problem", ["away", "refused", "another CA", "nothing"])
async def test_without_the_keys_the_registry_starts_and_refuses_with_the_reason(
    problem: str, tmp_path: Path, api_server: ApiServer
) -> None:
    api_server.is_away = problem == "away"
    authority = Authority(tmp_path / "other") if problem == "another CA" else api_server.authority
    with api_server.serve() as url:
        source = {
            "key_set": "https://127.0.0.1:1/openid/v1/jwks" if problem == "nothing" else url,
            "key_set_ca_file": authority.file,
            "key_set_token_file": None if problem == "refused" else tmp_path / "api-token",
        }
        async with guarded(tmp_path, **source) as on, on.channel(KEY.token()) as channel:
            with pytest.raises(Unavailable, match="is not known yet, and the cluster's keys cannot be read: https"):
                await listed(channel)
