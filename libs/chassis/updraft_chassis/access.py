"""Authorization: an authority knows the roles of every bearer token. `Tokens` is an authority that reads a file.

    read      Get, List, Fetch, Watch, History, ListPods      dashboards, `updraft status`, `updraft ui`
    serve     read, and Fleet.Connect                         a pod
    publish   read, and Publish, ReportTraining, ListForgotten     a trainer
    operate   everything                                      a person, or automation on behalf of one

The role serve may be bound to a speculator, as `serve@NAME`. Its pods then report for that one only, and only they learn how
tenants of that one are hashed. A method that is missing from `ROLES` requires the role operate. A call ends when its token
expires. Removing a token from the file rejects the next call, but does not end a running one.
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from updraft_chassis.credentials import AUTHORIZATION, SCHEME, ReloadingFile, check_token, read_text
from updraft_chassis.errors import Forbidden, InvalidInput, Unauthenticated

MIN_TOKEN_CHARACTERS = 16
"""Shorter tokens can be guessed; `openssl rand -hex 32` makes 64 characters."""

_LINE = re.compile(r"(?P<grant>[a-z]+(@[a-z0-9.-]+)?)(\s*:\s*|\s+)(?P<token>\S+)")


class Role(StrEnum):
    READ = "read"
    SERVE = "serve"
    PUBLISH = "publish"
    OPERATE = "operate"

    def includes(self, other: "Role") -> bool:
        """Whether this role permits everything that the other one permits."""
        return self is other or self is Role.OPERATE or other is Role.READ


_REGISTRY = "/updraft.registry.v1.Registry/"
_READS = ("Get", "List", "Fetch", "Watch", "History", "ListPods")
_ACTS = ("Pin", "Unpin", "Pause", "Resume", "Promote", "Reject", "Retain", "SetPolicy", "ForgetTenant", "ListTenants")
_TRAINS = ("Publish", "ReportTraining", "ListForgotten")

ROLES: Mapping[str, Role] = {
    **{f"{_REGISTRY}{name}": Role.READ for name in _READS},
    **{f"{_REGISTRY}{name}": Role.OPERATE for name in _ACTS},
    **{f"{_REGISTRY}{name}": Role.PUBLISH for name in _TRAINS},
    "/updraft.fleet.v1.Fleet/Connect": Role.SERVE,
}
"""The minimum role for each method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A role; `speculator` is the one whose pods have the role serve, or empty for those of any."""

    role: Role
    speculator: str = ""

    @classmethod
    def parse(cls, text: str) -> "Grant | None":
        """Read `role`, or `serve@speculator`. None for anything else."""
        role, mark, speculator = text.partition("@")
        if role not in set(Role) or (mark and (role != Role.SERVE or not speculator)):
            return None
        return cls(role=Role(role), speculator=speculator)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls, according to a token."""

    grants: frozenset[Grant]
    """One grant, or those of several parts that share an account."""
    valid_s: float | None = None
    """Seconds until the token expires; None: it does not expire."""
    pod: str = ""
    """The pod that the token is bound to; empty if none."""

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset(grant.role for grant in self.grants)

    @property
    def speculators(self) -> frozenset[str]:
        """Those whose pods the caller may be; empty if it is not bound."""
        return frozenset(grant.speculator for grant in self.grants if grant.speculator)

    def may_report_for(self, speculator: str) -> bool:
        is_free = Grant(role=Role.SERVE) in self.grants or not self.speculators
        return Role.OPERATE in self.roles or is_free or speculator in self.speculators

    def may_hash_tenants_of(self, speculator: str) -> bool:
        """Whether it may have the salt, with which names can be tried. A pod that is not bound may claim any speculator."""
        return Role.OPERATE in self.roles or speculator in self.speculators


class Authority(Protocol):
    """Identifies callers by one kind of token."""

    async def caller(self, token: str) -> Caller | None:
        """None for a token of another kind. Unauthenticated, with the reason, for an invalid token of this kind."""
        ...


class Access:
    """Who may call what. `on_denied` receives the gRPC status name of each denial."""

    def __init__(self, *authorities: Authority, on_denied: Callable[[str], None] = lambda _: None) -> None:
        self._authorities = authorities
        self._on_denied = on_denied

    async def admit(self, method: str, metadata: Any) -> Caller:
        """The caller of a method. Unauthenticated or Forbidden if its roles are not sufficient."""
        try:
            return await self._admit(method, metadata)
        except (Unauthenticated, Forbidden) as denial:
            self._on_denied(denial.status)
            raise

    async def _admit(self, method: str, metadata: Any) -> Caller:
        required = ROLES.get(method, Role.OPERATE)
        short = method.rpartition(".")[2].replace("/", ".")
        roles = f"role {' or '.join(role for role in Role if role.includes(required))}"
        token = _bearer_token(metadata)
        if token is None:
            raise Unauthenticated(f"{short} requires a token with {roles}; the call has none")
        caller = await self._identified(token)
        if caller is None:
            raise Unauthenticated(f"{short} requires a token with {roles}; the call's token is unknown")
        if not any(role.includes(required) for role in caller.roles):
            raise Forbidden(f"role {' and '.join(sorted(caller.roles))} may not call {short}, which requires {roles}")
        return caller

    async def _identified(self, token: str) -> Caller | None:
        for authority in self._authorities:
            caller = await authority.caller(token)
            if caller is not None:
                return caller
        return None


class Tokens:
    """An authority: a file with one `role:token` or `serve@speculator:token` per line, read again when it changes.
    InvalidInput if it is not valid.

    Only digests of tokens are kept in memory, and all of them are compared in constant time.
    """

    def __init__(self, file: Path) -> None:
        self._grants = ReloadingFile([file], lambda: _read(file), what="tokens file")

    async def caller(self, token: str) -> Caller | None:
        grant = _grant(token, self._grants.get())
        return None if grant is None else Caller(grants=frozenset({grant}))


def _bearer_token(metadata: Any) -> str | None:
    for name, value in metadata or ():
        scheme, _, token = str(value).partition(" ")
        if name == AUTHORIZATION and scheme.lower() == SCHEME.lower():
            return token
    return None


def _grant(token: str, grants: Mapping[bytes, Grant]) -> Grant | None:
    """The grant of a token. It compares all digests, so the time taken does not reveal which one matched."""
    digest, match = _digest(token), None
    for other, grant in grants.items():
        if hmac.compare_digest(digest, other):
            match = grant
    return match


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _read(file: Path) -> Mapping[bytes, Grant]:
    """Grants by token digest. InvalidInput messages name the line, never its content."""
    tokens: dict[bytes, Grant] = {}
    for number, line in enumerate(read_text(file, "tokens").splitlines(), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            where = f"line {number} of {file}"
            grant, token = _parse(text, where)
            if _digest(token) in tokens:
                raise InvalidInput(f"{where} repeats the token of another line: a token has one role")
            tokens[_digest(token)] = grant
    if not tokens:
        raise InvalidInput(f"the tokens file {file} holds no token, so no client could connect")
    return tokens


def _parse(line: str, where: str) -> tuple[Grant, str]:
    match = _LINE.fullmatch(line)
    grant = Grant.parse(match["grant"]) if match else None
    if match is None or grant is None:
        raise InvalidInput(
            f"{where} is not `role:token` with one of the roles {', '.join(Role)}, or `serve@speculator:token`"
        )
    token = check_token(match["token"], f"the token in {where}")
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise InvalidInput(f"the token in {where} has {len(token)} characters, expected {MIN_TOKEN_CHARACTERS} or more")
    return grant, token
