"""Who may call what: bearer tokens, each of one role, from one file.

    read      Get, List, Fetch, Watch, History      who looks
    serve     read, and Fleet.Connect               a pod
    publish   read, and Publish                     a trainer
    operate   everything                            a person, or what acts for one

Only digests of tokens are kept, and all of them are compared in constant time. What the table below does not name needs
the role operate. A token that is taken out of the file ends no call that runs, only the next one.
"""

import asyncio
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio

from updraft_chassis.credentials import AUTHORIZATION, SCHEME, ReloadingFile, check_token, read_text
from updraft_chassis.errors import Forbidden, InvalidInput, Unauthenticated, UpdraftError

MIN_TOKEN_CHARACTERS = 16
"""Less can be guessed: `openssl rand -hex 32` makes 64."""

_LINE = re.compile(r"(?P<role>[a-z]+)(\s*:\s*|\s+)(?P<token>\S+)")

_FIRST_MESSAGE_S = 5.0


class Role(StrEnum):
    """What a token is for."""

    READ = "read"
    SERVE = "serve"
    PUBLISH = "publish"
    OPERATE = "operate"

    def includes(self, other: "Role") -> bool:
        """Whether this role may do what the other is for."""
        return self is other or self is Role.OPERATE or other is Role.READ


_REGISTRY = "/updraft.registry.v1.Registry/"
_READS = ("Get", "List", "Fetch", "Watch", "History")
_ACTS = ("Pin", "Unpin", "Pause", "Resume", "Promote", "Reject", "Retain", "SetPolicy")

ROLES: Mapping[str, Role] = {
    **{f"{_REGISTRY}{name}": Role.READ for name in _READS},
    **{f"{_REGISTRY}{name}": Role.OPERATE for name in _ACTS},
    f"{_REGISTRY}Publish": Role.PUBLISH,
    "/updraft.fleet.v1.Fleet/Connect": Role.SERVE,
}
"""The least role of every method."""


class Access(grpc.aio.ServerInterceptor):
    """Lets a call through to its method only with a token whose role includes it. `on_denied` gets the status."""

    def __init__(self, tokens_file: Path, on_denied: Callable[[str], None] = lambda _: None) -> None:
        self._tokens = ReloadingFile([tokens_file], lambda: _read(tokens_file), what="tokens file")
        self._on_denied = on_denied

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's own handler, or one that only refuses."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        why = self._refusal(method, handler_call_details.invocation_metadata)
        if handler is None or why is None:
            return handler
        self._on_denied(why.status)
        return _refusing(handler, why)

    def _refusal(self, method: str, metadata: Any) -> UpdraftError | None:
        """Why this call may not be; None if it may."""
        needed = ROLES.get(method, Role.OPERATE)
        short = method.rpartition(".")[2].replace("/", ".")
        takes = f"role {' or '.join(role for role in Role if role.includes(needed))}"
        token = _presented(metadata)
        if token is None:
            return Unauthenticated(f"{short} takes a token of {takes}; the call brought none")
        role = _role(token, self._tokens.get())
        if role is None:
            return Unauthenticated(f"{short} takes a token of {takes}; the call brought one that is not known here")
        if not role.includes(needed):
            return Forbidden(f"role {role} may not call {short}, which takes {takes}")
        return None


def _presented(metadata: Any) -> str | None:
    for name, value in metadata or ():
        scheme, _, token = str(value).partition(" ")
        if name == AUTHORIZATION and scheme.lower() == SCHEME.lower():
            return token
    return None


def _role(token: str, known: Mapping[bytes, Role]) -> Role | None:
    """The role of a token; looks at all of them, whichever it is."""
    digest, found = _digest(token), None
    for other, role in known.items():
        if hmac.compare_digest(digest, other):
            found = role
    return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _read(file: Path) -> Mapping[bytes, Role]:
    """Roles by the digests of their tokens. InvalidInput names the line, and never what stands there."""
    tokens: dict[bytes, Role] = {}
    for number, line in enumerate(read_text(file, "tokens").splitlines(), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            where = f"line {number} of {file}"
            role, token = _parse(text, where)
            if _digest(token) in tokens:
                raise InvalidInput(f"{where} has the token of another line: one token, one role")
            tokens[_digest(token)] = role
    if not tokens:
        raise InvalidInput(f"the tokens file {file} holds no token: nobody could connect")
    return tokens


def _parse(line: str, where: str) -> tuple[Role, str]:
    found = _LINE.fullmatch(line)
    if found is None or found["role"] not in set(Role):
        raise InvalidInput(f"{where} is not `role:token`, with a role of {', '.join(Role)}")
    token = check_token(found["token"], f"the token in {where}")
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise InvalidInput(f"the token in {where} has {len(token)} characters, expected {MIN_TOKEN_CHARACTERS} or more")
    return Role(found["role"]), token


def _refusing(handler: Any, why: UpdraftError) -> Any:
    """A handler of the same kind that raises."""

    async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        if handler.request_streaming and handler.response_streaming:
            await _take_one(request)
        raise why

    asked = "stream" if handler.request_streaming else "unary"
    answered = "stream" if handler.response_streaming else "unary"
    return getattr(grpc, f"{asked}_{answered}_rpc_method_handler")(
        refuse, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
    )


async def _take_one(requests: Any) -> None:
    """A pod writes its first report at once, and while it writes it would miss the refusal (see rpc.ErrorsToStatus)."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_FIRST_MESSAGE_S):
            await anext(aiter(requests), None)
