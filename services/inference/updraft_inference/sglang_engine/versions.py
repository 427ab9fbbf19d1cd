"""Which SGLang can be served with, and what each of them can do. One table; a refusal says what is missing."""

from dataclasses import dataclass
from enum import StrEnum

from updraft_chassis.errors import InvalidInput


class Ability(StrEnum):
    """What Updraft needs of a server, in words that fit behind "it cannot"."""

    PLUGINS = "load plugins by entry point"
    VERSION_SPANS = "say which version gave which token"
    DRAFT_UPDATE = "update the weights of a draft alone"
    READY_ROUTE = "say that it is paused"


SINCE = {
    (0, 5, 15): Ability.PLUGINS,
    (0, 5, 19): Ability.VERSION_SPANS,
    (0, 5, 21): Ability.DRAFT_UPDATE,
    (0, 5, 23): Ability.READY_ROUTE,
}
"""First release with each of them."""

TESTED = ((0, 5, 23),)
"""Releases that the contract tests run against. A later one serves too: what it does is proved by checksum at each swap,
and the plugin looks at what it hooks into when it starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What is known of a release that can serve."""

    version: str
    is_tested: bool


def support(version: str) -> Support:
    """Look a release up ("0.5.23", "0.5.24.post1"). InvalidInput, with what it cannot do, if it is too old or unreadable."""
    number = _number(version)
    missing = [ability for first, ability in SINCE.items() if number < first]
    if missing:
        oldest = ".".join(map(str, max(SINCE)))
        raise InvalidInput(f"SGLang {version} is too old, {oldest} is needed: it cannot {', nor '.join(missing)}")
    return Support(version=version, is_tested=number in TESTED)


def _number(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:3]
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise InvalidInput(f"the server says that its version is {version!r}, which is no release of SGLang")
    return tuple(map(int, parts))
