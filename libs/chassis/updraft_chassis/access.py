"""Authorization: one file of bearer tokens, each with one role.

    read      Get, List, Fetch, Watch, History      dashboards, `updraft status`
    serve     read, and Fleet.Connect               a pod
    publish   read, and Publish, ReportTraining     a trainer
    operate   everything                            a person, or automation on behalf of one

Only digests of tokens are kept in memory, and all of them are compared in constant time. A method that is missing from
`ROLES` requires the role operate. Removing a token from the file rejects the next call, but does not end a running one.
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from updraft_chassis.credentials import AUTHORIZATION, SCHEME, ReloadingFile, check_token, read_text
from updraft_chassis.errors import Forbidden, InvalidInput, Unauthenticated, UpdraftError

MIN_TOKEN_CHARACTERS = 16
"""Shorter tokens can be guessed; `openssl rand -hex 32` makes 64 characters."""

_LINE = re.compile(r"(?P<role>[a-z]+)(\s*:\s*|\s+)(?P<token>\S+)")


class Role(StrEnum):
    READ = "read"
    SERVE = "serve"
    PUBLISH = "publish"
    OPERATE = "operate"

    def includes(self, other: "Role") -> bool:
        """Whether this role permits everything that the other one permits."""
        return self is other or self is Role.OPERATE or other is Role.READ


_REGISTRY = "/updraft.registry.v1.Registry/"
_READS = ("Get", "List", "Fetch", "Watch", "History")
_ACTS = ("Pin", "Unpin", "Pause", "Resume", "Promote", "Reject", "Retain", "SetPolicy")

ROLES: Mapping[str, Role] = {
    **{f"{_REGISTRY}{name}": Role.READ for name in _READS},
    **{f"{_REGISTRY}{name}": Role.OPERATE for name in _ACTS},
    **{f"{_REGISTRY}{name}": Role.PUBLISH for name in ("Publish", "ReportTraining")},
    "/updraft.fleet.v1.Fleet/Connect": Role.SERVE,
}
"""The minimum role for each method."""


class Access:
    """Who may call what, by the roles of tokens. `on_denied` receives the gRPC status name of each denial."""

    def __init__(self, tokens_file: Path, on_denied: Callable[[str], None] = lambda _: None) -> None:
        self._tokens = ReloadingFile([tokens_file], lambda: _read(tokens_file), what="tokens file")
        self._on_denied = on_denied

    def denial(self, method: str, metadata: Any) -> UpdraftError | None:
        """Why a call is denied; None if its token has a sufficient role."""
        denial = self._denial(method, metadata)
        if denial is not None:
            self._on_denied(denial.status)
        return denial

    def _denial(self, method: str, metadata: Any) -> UpdraftError | None:
        required = ROLES.get(method, Role.OPERATE)
        short = method.rpartition(".")[2].replace("/", ".")
        roles = f"role {' or '.join(role for role in Role if role.includes(required))}"
        token = _bearer_token(metadata)
        if token is None:
            return Unauthenticated(f"{short} requires a token with {roles}; the call has none")
        role = _role(token, self._tokens.get())
        if role is None:
            return Unauthenticated(f"{short} requires a token with {roles}; the call's token is unknown")
        if not role.includes(required):
            return Forbidden(f"role {role} may not call {short}, which requires {roles}")
        return None


def _bearer_token(metadata: Any) -> str | None:
    for name, value in metadata or ():
        scheme, _, token = str(value).partition(" ")
        if name == AUTHORIZATION and scheme.lower() == SCHEME.lower():
            return token
    return None


def _role(token: str, roles: Mapping[bytes, Role]) -> Role | None:
    """The role of a token. It compares all digests, so the time taken does not reveal which one matched."""
    digest, match = _digest(token), None
    for other, role in roles.items():
        if hmac.compare_digest(digest, other):
            match = role
    return match


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _read(file: Path) -> Mapping[bytes, Role]:
    """Roles by token digest. InvalidInput messages name the line, never its content."""
    tokens: dict[bytes, Role] = {}
    for number, line in enumerate(read_text(file, "tokens").splitlines(), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            where = f"line {number} of {file}"
            role, token = _parse(text, where)
            if _digest(token) in tokens:
                raise InvalidInput(f"{where} repeats the token of another line: a token has one role")
            tokens[_digest(token)] = role
    if not tokens:
        raise InvalidInput(f"the tokens file {file} holds no token, so no client could connect")
    return tokens


def _parse(line: str, where: str) -> tuple[Role, str]:
    match = _LINE.fullmatch(line)
    if match is None or match["role"] not in set(Role):
        raise InvalidInput(f"{where} is not `role:token` with one of the roles {', '.join(Role)}")
    token = check_token(match["token"], f"the token in {where}")
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise InvalidInput(f"the token in {where} has {len(token)} characters, expected {MIN_TOKEN_CHARACTERS} or more")
    return Role(match["role"]), token
