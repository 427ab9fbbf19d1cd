"""The two Redis users of a speculator: its pods may add traces, and its trainer may read and settle them.

A user reaches only the keys of its speculator, with only the commands below. None of them lists keys, tells who else uses the
server, runs scripts or changes the server. INFO is missing for that reason: it counts all keys and clients.

Rejected: one user for both roles, because an attacker in a serving pod could then read what other pods have sent;
`%W~` patterns and selectors, which Redis 6.2 does not have.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from updraft_chassis import streams

_PREFIX = "updraft"
_PASSWORD = re.compile(r"[0-9a-f]{64}")
_PARAMETERS = frozenset(
    (
        *("db", "max_connections", "health_check_interval"),
        *("socket_timeout", "socket_connect_timeout", "socket_keepalive"),
        *("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data", "ssl_cert_reqs", "ssl_check_hostname", "ssl_min_version"),
        *("ssl_include_verify_flags", "ssl_exclude_verify_flags", "ssl_ciphers", "ssl_certfile", "ssl_keyfile"),
    )
)
"""Parameters of an address that users get too. Others may be credentials, such as `password` and `ssl_password`."""

_EXPECTED = (
    "expected an address like redis://USER:PASSWORD@HOST:PORT/DB; percent-encode special characters of the password"
)


class Role(StrEnum):
    WRITER = "writer"
    """Serving pods."""
    READER = "reader"
    """The trainer."""


_CLIENT = ("select", "cluster|slots", "command")
"""For the client itself: a database in the address, and the nodes of a Redis Cluster."""

_STREAMS = (
    *("exists", "xlen", "xinfo|groups", "xgroup|create", "xreadgroup", "xpending", "xclaim", "xrange", "xack", "xdel"),
    *("xadd", "xtrim"),  # dead letters, and room for a group in a full Redis
)
_LEASE = ("get", "set", "pexpire", "unlink")

COMMANDS: Mapping[Role, tuple[str, ...]] = {
    Role.WRITER: ("xadd", "xtrim", "pexpire", "persist", *_CLIENT),
    Role.READER: (*_STREAMS, *_LEASE, *_CLIENT),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisUser:
    """A user as it should be on every node of the operator's Redis."""

    name: str
    rules: tuple[str, ...]
    password_hash: str
    """Empty until the Secret has a password: then the user stays as it is."""
    keeps_former: bool = False
    """Earlier passwords stay valid, for pods that have not restarted since."""

    def words(self, listed: Iterable[str] = ()) -> tuple[str, ...]:
        """Arguments of ACL SETUSER for a user that has passwords with the hashes `listed`. Nothing else of it stays, such as a
        selector of Redis 7. Redis applies all words at once, so connections stay open and authenticated."""
        hashes = {self.password_hash, *(listed if self.keeps_former else ())}
        return ("reset", "on", *(f"#{each}" for each in sorted(hashes)), *self.rules)


def rules(role: Role, namespace: str, speculator: str) -> tuple[str, ...]:
    """The keys and commands of a role; `namespace` is that of the stream keys."""
    streams_only, all_keys = streams.patterns(namespace, speculator)
    pattern = streams_only if role is Role.WRITER else all_keys
    return (f"~{pattern}", "resetchannels", "nocommands", *(f"+{name}" for name in COMMANDS[role]))


def user_name(installation: str, namespace: str, speculator: str, role: Role) -> str:
    return f"{_PREFIX}.{installation}.{namespace}.{speculator}.{role}"


def speculator_of(name: str, installation: str) -> tuple[str, str] | None:
    """Namespace and name of the speculator that a user was made for; None for a user of somebody else."""
    match = re.fullmatch(rf"{_PREFIX}\.{re.escape(installation)}\.([^.]+)\.(.+)\.(?:{'|'.join(Role)})", name)
    return (match[1], match[2]) if match is not None else None


def hashed(password: str) -> str:
    """As Redis stores it. Passwords are random, so nobody guesses one from its hash."""
    return hashlib.sha256(password.encode()).hexdigest()


def user_url(url: str, user: str, password: str) -> str:
    """The address `url`, for which `address_problem` has none, with this user in place of its own."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    query = urlencode([(name, value) for name, value in parse_qsl(parts.query) if name in _PARAMETERS])
    return urlunsplit(parts._replace(netloc=f"{quote(user, safe='')}:{password}@{host}", query=query, fragment=""))


def with_authorities(url: str, authorities: str) -> str:
    """The address for the operator itself, which has the CAs (in PEM format) in memory where pods have a file."""
    parts = urlsplit(url)
    query = [(name, value) for name, value in parse_qsl(parts.query) if name != "ssl_ca_certs"]
    return urlunsplit(parts._replace(query=urlencode([*query, ("ssl_ca_data", authorities)])))


def address_problem(url: str) -> str:
    """Why `user_url` could copy a part of the password in `url`, in words that do not quote it; empty if it could not."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is none
    except ValueError:
        return _EXPECTED
    is_socket = parts.scheme == "unix"
    host = parts.netloc.rpartition("@")[2]
    rest = (*(() if is_socket else (parts.path,)), parts.query, parts.fragment)
    return _EXPECTED if is_socket == bool(host) or any("@" in part for part in rest) else ""


def password_of(url: str) -> str:
    """The password in an address that `user_url` made; empty for any other."""
    try:
        password = urlsplit(url).password or ""
    except ValueError:
        return ""
    return password if _PASSWORD.fullmatch(password) else ""
