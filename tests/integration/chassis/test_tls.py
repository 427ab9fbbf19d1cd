import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.certificates import Authority
from tests.support.rpc import listening, service
from tests.support.wait import until

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_chassis import rpc
from updraft_chassis.access import Access, Tokens
from updraft_chassis.credentials import Credentials, ServerTls
from updraft_chassis.errors import InvalidInput, Unauthenticated, Unavailable

REGISTRY = pb.DESCRIPTOR.services_by_name["Registry"]


@pytest.fixture
def servers(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "servers")


@pytest.fixture
def clients(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "clients")


@asynccontextmanager
async def serving(tls: ServerTls, access: Access | None = None) -> AsyncIterator[str]:
    async def get(request: pb.GetRequest, context: Any) -> pb.GetResponse:
        return pb.GetResponse()

    async with listening(service(REGISTRY, Get=get), access=access, tls=tls) as address:
        yield address


async def get(address: str, credentials: Credentials | None = None) -> None:
    async with rpc.channel(address, credentials) as channel:
        with rpc.errors():
            await RegistryStub(channel).Get(pb.GetRequest(), timeout=30)


async def test_a_client_that_believes_the_servers_authority_gets_through(servers: Authority) -> None:
    async with serving(servers.server()) as address:
        await get(address, Credentials(ca_file=servers.file))


@pytest.mark.attack(
    boundary="registry",
    attack="a server with a certificate of another CA",
    outcome="clients do not believe it",
)
async def test_a_server_of_another_authority_is_not_believed(servers: Authority, clients: Authority) -> None:
    async with serving(servers.server()) as address:
        with pytest.raises(Unavailable):
            await get(address, Credentials(ca_file=clients.file))


@pytest.mark.attack(boundary="registry", attack="plaintext to a TLS port", outcome="nothing is answered")
async def test_a_client_that_speaks_plaintext_gets_nothing(servers: Authority) -> None:
    async with serving(servers.server()) as address:
        with pytest.raises(Unavailable):
            await get(address)


@pytest.mark.attack(
    boundary="registry",
    attack="a client certificate of another CA, or none",
    outcome="the connection is refused",
)
async def test_with_a_client_ca_only_its_certificates_get_in(servers: Authority, clients: Authority) -> None:
    async with serving(servers.server(clients=clients)) as address:
        await get(address, clients.client(servers=servers))
        with pytest.raises(Unavailable):
            await get(address, Credentials(ca_file=servers.file))
        with pytest.raises(Unavailable):
            await get(address, servers.client(servers=servers))


async def test_tokens_and_certificates_are_both_asked_for(
    servers: Authority, clients: Authority, tmp_path: Path
) -> None:
    tokens_file, token_file = tmp_path / "tokens", tmp_path / "token"
    token_file.write_text("0123456789abcdef")
    tokens_file.write_text("read:0123456789abcdef")
    async with serving(servers.server(clients=clients), Access(Tokens(tokens_file))) as address:
        await get(address, clients.client(servers=servers, token_file=token_file))
        with pytest.raises(Unauthenticated):
            await get(address, clients.client(servers=servers))
        with pytest.raises(Unavailable):
            await get(address, Credentials(ca_file=servers.file, token_file=token_file))


async def test_a_servers_certificate_rotates_without_a_restart(
    servers: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Authority(tmp_path / "other")
    tls = servers.server()
    async with serving(tls) as address:
        await get(address, Credentials(ca_file=servers.file))

        tls.key_file.write_text("half a ke")
        await get(address, Credentials(ca_file=servers.file))

        renewed = other.server()
        tls.cert_file.write_bytes(renewed.cert_file.read_bytes())
        tls.key_file.write_bytes(renewed.key_file.read_bytes())

        async def is_renewed() -> bool:
            try:
                await get(address, Credentials(ca_file=other.file))
            except Unavailable:
                return False
            return True

        await until(is_renewed, what="the new certificate")
        with pytest.raises(Unavailable):
            await get(address, Credentials(ca_file=servers.file))

    assert any("the previous one stays in force" in record.message for record in caplog.records)


async def test_a_client_follows_its_ca_file_and_a_stream_goes_on_meanwhile(
    servers: Authority, clients: Authority, tmp_path: Path
) -> None:
    seen = asyncio.Queue[int]()

    async def watch(request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:
        while True:
            yield pb.WatchResponse(state=pb.SpeculatorState(latest=await seen.get()))

    async def get(request: pb.GetRequest, context: Any) -> pb.GetResponse:
        return pb.GetResponse()

    tls, ca_file = servers.server(), tmp_path / "ca.pem"
    ca_file.write_bytes(servers.file.read_bytes())
    methods = service(REGISTRY, Watch=watch, Get=get)
    async with listening(methods, tls=tls) as address, rpc.channel(address, Credentials(ca_file=ca_file)) as channel:
        stub = RegistryStub(channel)
        answers = aiter(stub.Watch(pb.WatchRequest()))
        seen.put_nowait(1)
        assert (await anext(answers)).state.latest == 1

        renewed = clients.server()
        tls.cert_file.write_bytes(renewed.cert_file.read_bytes())
        tls.key_file.write_bytes(renewed.key_file.read_bytes())
        ca_file.write_bytes(clients.file.read_bytes())
        with rpc.errors():
            await stub.Get(pb.GetRequest(), timeout=30)

        seen.put_nowait(2)
        assert (await anext(answers)).state.latest == 2
        with rpc.errors():
            await stub.Get(pb.GetRequest(), timeout=30)


async def test_a_client_may_reach_a_server_by_another_name_than_its_certificates(servers: Authority) -> None:
    async with serving(servers.server()) as address:
        port = address.rpartition(":")[2]
        await get(f"localhost:{port}", Credentials(ca_file=servers.file, server_name="127.0.0.1"))
        with pytest.raises(Unavailable):
            await get(f"localhost:{port}", Credentials(ca_file=servers.file))


async def test_a_client_with_cas_in_memory_gets_through(servers: Authority, clients: Authority) -> None:
    async with serving(servers.server()) as address:
        await get(address, Credentials(authorities=clients.file.read_bytes() + servers.file.read_bytes()))
        with pytest.raises(Unavailable):
            await get(address, Credentials(authorities=clients.file.read_bytes()))


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        pytest.param({"cert_file": "missing"}, "cannot be read: No such file", id="no certificate"),
        pytest.param({"cert_file": "text"}, "not a PEM certificate and its key", id="no PEM"),
        pytest.param({"key_file": "other"}, "not a PEM certificate and its key", id="the key of another"),
        pytest.param({"client_ca_file": "text"}, "no certificates in PEM", id="no CA"),
    ],
)
def test_a_server_with_wrong_files_does_not_start(
    broken: dict[str, str], told: str, servers: Authority, clients: Authority, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("text")
    tls = servers.server()
    files: dict[str, Path] = {"cert_file": tls.cert_file, "key_file": tls.key_file, "client_ca_file": clients.file}
    key_of_another = clients.server().key_file
    for name, value in broken.items():
        files[name] = key_of_another if value == "other" else tmp_path / value

    with pytest.raises(InvalidInput, match=told):
        rpc.bind(rpc.server(), host="127.0.0.1", port=0, setting="none", tls=ServerTls(**files))


def test_half_a_client_certificate_is_refused(servers: Authority, clients: Authority) -> None:
    whole = clients.client(servers=servers)
    for half in (
        Credentials(ca_file=whole.ca_file, cert_file=whole.cert_file),
        Credentials(ca_file=whole.ca_file, key_file=whole.key_file),
        Credentials(cert_file=whole.cert_file, key_file=whole.key_file),
    ):
        with pytest.raises(InvalidInput, match="needs its key file, and both need the registry's CA file"):
            rpc.channel("127.0.0.1:1", half)
