"""The sender's terms in a request's HTTP headers, and the mark that takes them to an engine's other processes. Pure.

The mark is in a request's extra arguments, as an object: clients can put text and numbers there, but no object, so none can
forge it. A request without a mark never passed our middleware, so it has not been asked, and nothing of it is
captured.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

CAPTURE, DOMAIN, AUTHORIZATION = b"x-updraft-capture", b"x-updraft-domain", b"authorization"
KEY = "updraft"
"""The extra argument that has the mark."""
OPT_OUT = "updraft_capture"
"""The extra argument by which a client itself may say what CAPTURE says, for clients that cannot set headers."""

MAX_DOMAIN_CHARS = 64
_BEARER = "bearer"
_PERMIT = frozenset({"", "on"})
_REFUSE = frozenset({"off", "no-train", "no-retain"})
"""Rows serve to train, and the trainer keeps what it trains on, so each of these leaves counters alone."""

Headers = Iterable[tuple[bytes, bytes]]
"""As ASGI has them: names in lower case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """`domain` is "" for none."""

    domain: str = ""
    permitted: bool = True
    """Rows and texts of the request may be captured."""


NOT_ASKED = Terms(permitted=False)


class UnknownTermsError(Exception):
    """An invalid header. The message is for the client."""


def read_terms(headers: Headers) -> Terms:
    """The terms of a request.

    Raises UnknownTermsError for a word in CAPTURE that does not exist, because a misspelt one must not be ignored.
    """
    pairs = list(headers)
    return Terms(
        domain=label(first(pairs, DOMAIN)[: 4 * MAX_DOMAIN_CHARS].decode("utf-8", "replace")),
        permitted=_permits(b",".join(value for name, value in pairs if name == CAPTURE)),
    )


def api_key(headers: Headers) -> str:
    """The key of `Authorization: Bearer KEY`; "" without one."""
    scheme, _, key = first(headers, AUTHORIZATION).decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == _BEARER else ""


def label(domain: str) -> str:
    """The name in one short printable line, because terminals and dashboards show it."""
    return "".join(char if char.isprintable() else "?" for char in domain[:MAX_DOMAIN_CHARS]).strip()


def marked(extra: Mapping[str, Any] | None, terms: Terms | None) -> dict[str, Any] | None:
    """The extra arguments of a request with the mark of these terms, and with no other; None for none at all.

    Either one opts the request out.
    """
    others = {name: value for name, value in (extra or {}).items() if name != KEY}
    if terms is None:
        return others or None
    says = others.get(OPT_OUT, "")
    permitted = terms.permitted and isinstance(says, str) and says.strip().lower() in _PERMIT
    return {**others, KEY: {**asdict(terms), "permitted": permitted}}


def has_mark(extra: Mapping[str, Any] | None) -> bool:
    """Whether the sender of a request was asked."""
    mark = (extra or {}).get(KEY)
    return isinstance(mark, dict) and mark.keys() == asdict(NOT_ASKED).keys()


def read_mark(extra: Mapping[str, Any] | None) -> Terms:
    """The terms in the extra arguments of a request; NOT_ASKED without a mark."""
    return Terms(**extra[KEY]) if extra is not None and has_mark(extra) else NOT_ASKED


def first(headers: Headers, name: bytes) -> bytes:
    """The value of the first header with this name; b"" without one."""
    return next((value for other, value in headers if other == name), b"")


def _permits(header: bytes) -> bool:
    words = {word.strip().lower() for word in header.decode("latin-1").split(",")}
    if unknown := sorted(words - _PERMIT - _REFUSE):
        raise UnknownTermsError(f"X-Updraft-Capture: expected on, off, no-train or no-retain, got {unknown[0][:40]!a}")
    return words.isdisjoint(_REFUSE)
