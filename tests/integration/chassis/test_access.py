import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from tests.support.rpc import listening, service

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_artifacts import transfer
from updraft_chassis import rpc
from updraft_chassis.access import ROLES, Access, Caller, Grant, Role, Tokens
from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import Forbidden, InvalidInput, Unauthenticated, UpdraftError

SERVICES = [pb.DESCRIPTOR.services_by_name["Registry"], fleet_pb2.DESCRIPTOR.services_by_name["Fleet"]]
METHODS: list[MethodDescriptor] = [method for each in SERVICES for method in each.methods]

TOKENS = {role: f"token-of-{role}-0123456789" for role in Role}
NOBODYS = "token-of-nobody-0123456789"


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text("# who may what\n\n" + "".join(f"{role}:{token}\n" for role, token in TOKENS.items()))
    return file


def everything() -> list[grpc.GenericRpcHandler]:
    """Every method of both services, as the protos have them; each answers once with an empty message."""
    return [service(each, **{method.name: answering(method) for method in each.methods}) for each in SERVICES]


def answering(method: MethodDescriptor) -> Any:
    answer = GetMessageClass(method.output_type)()

    async def read(request: Any) -> None:
        """To the end: a client that still sends when the call ends loses its status."""
        if method.client_streaming:
            async for _ in request:
                pass

    async def one(request: Any, context: Any) -> Any:
        await read(request)
        return answer

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        await read(request)
        yield answer

    return stream if method.server_streaming else one


async def call(channel: grpc.aio.Channel, method: MethodDescriptor) -> None:
    """Call a method as its stub would, and read the answer to its end."""
    request = GetMessageClass(method.input_type)()
    asked, answered = ("stream" if it else "unary" for it in (method.client_streaming, method.server_streaming))
    callable_ = getattr(channel, f"{asked}_{answered}")(
        path(method),
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    with rpc.errors():
        answer = callable_(iter([request]) if method.client_streaming else request, timeout=30)
        if method.server_streaming:
            async for _ in answer:
                pass
        else:
            await answer


def path(method: MethodDescriptor) -> str:
    assert method.containing_service is not None
    return f"/{method.containing_service.full_name}/{method.name}"


def bearing(folder: Path, token: str) -> Credentials:
    file = folder / "my-token"
    file.write_text(f"{token}\n")
    return Credentials(token_file=file)


def replace(file: Path, content: str) -> None:
    """As Kubernetes and other careful writers do."""
    new = file.with_suffix(".new")
    new.write_text(content)
    new.replace(file)


def test_every_method_has_a_role() -> None:
    assert {path(method) for method in METHODS} == set(ROLES)


@pytest.mark.attack(
    boundary="registry",
    attack="a call without a token, with an unknown one, or with too weak a role, to each method",
    outcome="refused, and the token is not repeated",
)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_a_call_needs_a_token_that_is_known_and_whose_role_is_enough(
    method: MethodDescriptor, tokens_file: Path, tmp_path: Path
) -> None:
    denied: list[str] = []
    async with listening(*everything(), access=Access(Tokens(tokens_file), on_denied=denied.append)) as address:
        async with rpc.channel(address) as nameless:
            with pytest.raises(Unauthenticated, match=f"{method.name} requires a token with role .*the call has none"):
                await call(nameless, method)
        async with rpc.channel(address, bearing(tmp_path, NOBODYS)) as stranger:
            with pytest.raises(Unauthenticated, match=f"{method.name} requires .*token is unknown") as refused:
                await call(stranger, method)
        assert NOBODYS not in str(refused.value)
        for role, token in TOKENS.items():
            async with rpc.channel(address, bearing(tmp_path, token)) as known:
                if role.includes(ROLES[path(method)]):
                    await call(known, method)
                else:
                    with pytest.raises(Forbidden, match=f"role {role} may not call .*{method.name}"):
                        await call(known, method)

    num_forbidden = sum(not role.includes(ROLES[path(method)]) for role in Role)
    assert denied == ["UNAUTHENTICATED"] * 2 + ["PERMISSION_DENIED"] * num_forbidden


class Counting:
    """Knows every token as that of a pod of this name, and counts how often it is asked."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def caller(self, token: str) -> Caller:
        self.num_asked += 1
        return Caller(grants=frozenset({Grant(role=Role.OPERATE)}), pod=token)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_a_call_is_identified_once_and_its_method_knows_the_caller(
    method: MethodDescriptor, tmp_path: Path
) -> None:
    assert method.containing_service is not None
    answer, callers = answering(method), []

    async def one(request: Any, context: Any) -> Any:
        callers.append(rpc.current_call().caller)
        return await answer(request, context)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        async for response in answer(request, context):
            callers.append(rpc.current_call().caller)
            yield response

    handler = service(method.containing_service, **{method.name: stream if method.server_streaming else one})
    counting = Counting()
    async with listening(handler, access=Access(counting)) as address:
        for pod in ("pod-0", "pod-1"):
            async with rpc.channel(address, bearing(tmp_path, pod)) as channel:
                await call(channel, method)

    assert [caller.pod for caller in callers if caller is not None] == ["pod-0", "pod-1"]
    assert counting.num_asked == 2


def test_reading_is_in_every_role_and_everything_in_operate() -> None:
    may = {role: {other for other in Role if role.includes(other)} for role in Role}

    assert may == {
        Role.READ: {Role.READ},
        Role.SERVE: {Role.READ, Role.SERVE},
        Role.PUBLISH: {Role.READ, Role.PUBLISH},
        Role.OPERATE: set(Role),
    }


@pytest.mark.attack(
    boundary="registry",
    attack="a method that nobody gave a role",
    outcome="it needs the strongest one",
)
async def test_a_method_that_the_table_does_not_name_needs_the_role_operate(tokens_file: Path, tmp_path: Path) -> None:
    async def new(request: Any, context: Any) -> bytes:
        return b"done"

    handler: Any = grpc.unary_unary_rpc_method_handler(new)
    services = grpc.method_handlers_generic_handler("updraft.registry.v1.Registry", {"New": handler})
    async with listening(services, access=Access(Tokens(tokens_file))) as address:
        for role, token in TOKENS.items():
            async with rpc.channel(address, bearing(tmp_path, token)) as channel:
                method: Any = channel.unary_unary("/updraft.registry.v1.Registry/New")
                if role is Role.OPERATE:
                    assert await method(b"", timeout=30) == b"done"
                else:
                    with pytest.raises(Forbidden), rpc.errors():
                        await method(b"", timeout=30)


async def test_without_a_tokens_file_whoever_connects_may_call_everything(tmp_path: Path) -> None:
    async with listening(*everything()) as address:
        for credentials in (None, bearing(tmp_path, NOBODYS)):
            async with rpc.channel(address, credentials) as channel:
                for method in METHODS:
                    await call(channel, method)


async def test_a_large_upload_hears_why_it_is_refused(tokens_file: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"x" * (8 * rpc.CHUNK_BYTES))
    manifest = pb.Manifest(size_bytes=weights.stat().st_size)
    async with listening(*everything(), access=Access(Tokens(tokens_file))) as address:
        async with rpc.channel(address, bearing(tmp_path, TOKENS[Role.READ])) as channel:
            with pytest.raises(Forbidden, match=r"role read may not call Registry\.Publish"):
                await transfer.upload(RegistryStub(channel), manifest, weights)
        async with rpc.channel(address, bearing(tmp_path, TOKENS[Role.PUBLISH])) as channel:
            await transfer.upload(RegistryStub(channel), manifest, weights)


@pytest.mark.attack(
    boundary="registry",
    attack="reading a token from logs while tokens rotate",
    outcome="no log contains one",
)
async def test_tokens_rotate_on_both_sides_without_a_restart(
    tokens_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    get = SERVICES[0].methods_by_name["Get"]
    credentials = bearing(tmp_path, TOKENS[Role.READ])
    assert credentials.token_file is not None
    async with (
        listening(*everything(), access=Access(Tokens(tokens_file))) as address,
        rpc.channel(address, credentials) as channel,
    ):
        await call(channel, get)
        replace(tokens_file, f"read {NOBODYS}")
        with pytest.raises(Unauthenticated):
            await call(channel, get)
        replace(credentials.token_file, NOBODYS)
        await call(channel, get)

        replace(tokens_file, "half a li")
        replace(credentials.token_file, "")
        await call(channel, get)

    unusable = [record for record in caplog.records if "is not valid" in record.message]
    assert len(unusable) == 2
    assert not any(token in str(vars(record)) for record in caplog.records for token in (NOBODYS, *TOKENS.values()))


@pytest.mark.attack(
    boundary="registry",
    attack="a tokens file that is damaged or has short tokens",
    outcome="it is refused in a sentence that shows no token",
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "holds no token", id="empty"),
        pytest.param("# nothing yet\n", "holds no token", id="only a comment"),
        pytest.param(
            "read:0123456789abcdef\nadmin:secret-0123456789", "line 2 .*read, serve, publish, operate", id="role"
        ),
        pytest.param("secret-0123456789abcdef", "line 1 .*not `role:token`", id="no role"),
        pytest.param("read:secret-0123456789 more", "line 1 .*not `role:token`", id="two words"),
        pytest.param("read@chat:secret-0123456789", "line 1 .*not `role:token`", id="bound, and not for pods"),
        pytest.param("serve@:secret-0123456789", "line 1 .*not `role:token`", id="bound to nothing"),
        pytest.param("read:secret", "line 1 .*6 characters, expected 16", id="short"),
        pytest.param(f"read:{NOBODYS}\n\nserve:{NOBODYS}", "line 3 .*the token of another line", id="twice"),
        pytest.param("read:s\u00e9cret-0123456789", "ASCII", id="not ASCII"),
    ],
)
def test_a_wrong_tokens_file_is_refused_without_telling_what_stands_in_it(
    content: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    file.write_text(content)

    with pytest.raises(InvalidInput, match=message) as refused:
        Tokens(file)

    assert "secret" not in str(refused.value)
    assert NOBODYS not in str(refused.value)


@pytest.mark.parametrize("line", ["read:{}", "read {}", "  read : {}  ", "read\t{}"])
async def test_a_line_is_a_role_and_a_token_however_they_are_parted(line: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(line.format("a:token/with+signs=="))
    credentials = bearing(tmp_path, "a:token/with+signs==")
    async with (
        listening(*everything(), access=Access(Tokens(file))) as address,
        rpc.channel(address, credentials) as channel,
    ):
        await call(channel, SERVICES[0].methods_by_name["Get"])


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read: No such file"), ("", "no token"), ("two words", "no token")]
)
def test_a_client_without_a_sound_token_does_not_start(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)

    with pytest.raises(UpdraftError, match=message):
        rpc.channel("127.0.0.1:1", Credentials(token_file=file))
