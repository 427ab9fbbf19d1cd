"""The sender's terms in a request's HTTP headers, and the mark that takes them to an engine's other processes. Pure.

The mark is in a request's extra arguments, as an object: clients can put text and numbers there, but no object, so none can
forge it. A request without a mark never passed our middleware, so it has not been asked, and nothing of it is
captured.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

CAPTURE, DOMAIN, AUTHORIZATION = b"x-updraft-capture", b"x-updraft-domain", b"authorization"
KEY = "updraft"
"""The extra argument that has the mark."""
OPT_OUT = "updraft_capture"
"""The extra argument by which a client itself may say what CAPTURE says, for clients that cannot set headers."""

MAX_DOMAIN_CHARS = 64
MAX_TENANT_CHARS = 256
"""In the name of a tenant, as in `updraft_chassis.tenants.hashes`."""
_BEARER = "bearer"
OPT_IN, NO_TRAIN = "on", "no-train"
_REFUSE = frozenset({"off", "no-retain"})
"""The trainer keeps the rows that it uses, so each of these leaves counters alone."""
_WORDS = frozenset({OPT_IN, NO_TRAIN, *_REFUSE})

Headers = Iterable[tuple[bytes, bytes]]
"""As ASGI has them: names in lower case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """`domain` is "" for none. `tenant` is the SHA-256 of the tenant's name, in hexadecimal; "" for none."""

    domain: str = ""
    tenant: str = ""
    permitted: bool = True
    """Rows and texts of the request may be captured."""
    train: bool = True
    """Drafts may be trained on it, not only judged by it."""
    opted_in: bool = False
    """Its sender said so, which agents may require."""
    retention_s: int = 0
    """Age at which its traces are deleted; 0: as all others."""
    region: str = ""
    """The only one in which its traces may be stored; "": any."""

    def with_words(self, words: frozenset[str]) -> "Terms":
        """The terms of a sender who also says these words, which can only permit less."""
        return replace(
            self,
            permitted=self.permitted and words.isdisjoint(_REFUSE),
            train=self.train and NO_TRAIN not in words,
            opted_in=self.opted_in or OPT_IN in words,
        )


NOT_ASKED = Terms(permitted=False)


class UnknownTermsError(Exception):
    """An invalid or repeated header. The message is for the client."""


def read_terms(headers: Headers, tenant_header: bytes = b"") -> Terms:
    """The terms of a request; `tenant_header`, in lower case, names its tenant (b"": no header does).

    Raises UnknownTermsError for a word in CAPTURE that does not exist, because a misspelt one must not be ignored, and for a
    tenant that `tenant_named` refuses.
    """
    pairs = list(headers)
    terms = Terms(
        domain=label(first(pairs, DOMAIN)[: 4 * MAX_DOMAIN_CHARS].decode("utf-8", "replace")),
        tenant=tenant_named([value for name, value in pairs if name == tenant_header]) if tenant_header else "",
    )
    return terms.with_words(
        capture_words(b",".join(value for name, value in pairs if name == CAPTURE).decode("latin-1"))
    )


def capture_words(header: str) -> frozenset[str]:
    """The words in a value of CAPTURE. Raises UnknownTermsError for one that does not exist."""
    words = frozenset(word.strip().lower() for word in header.split(",")) - {""}
    if unknown := sorted(words - _WORDS):
        raise UnknownTermsError(f"X-Updraft-Capture: expected on, off, no-train or no-retain, got {unknown[0][:40]!a}")
    return words


def tenant_named(values: Sequence[bytes]) -> str:
    """The digest of the tenant that a header with these values names; "" for none.

    Raises UnknownTermsError for several headers, because a gateway may have added one to a client's, and for an invalid name.
    """
    if len(values) > 1:
        raise UnknownTermsError(f"expected one header with the tenant, got {len(values)}")
    return tenant_digest(values[0]) if values and values[0].strip() else ""


def tenant_digest(name: bytes) -> str:
    """The SHA-256 of a tenant's name, without ASCII spaces around it: the processes of a pod tell each other this of a tenant.

    Raises UnknownTermsError for a name that the registry would not take either, so that nobody could have it forgotten.
    """
    try:
        text = name.strip().decode()
    except UnicodeDecodeError:
        text = ""
    if not 0 < len(text) <= MAX_TENANT_CHARS or not text.isprintable():
        raise UnknownTermsError(f"the name of a tenant is 1 to {MAX_TENANT_CHARS} printable characters in UTF-8")
    return hashlib.sha256(text.encode()).hexdigest()


def api_key(headers: Headers) -> str:
    """The key of `Authorization: Bearer KEY`; "" without one."""
    scheme, _, key = first(headers, AUTHORIZATION).decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == _BEARER else ""


def label(domain: str) -> str:
    """The name in one short printable line, because terminals and dashboards show it."""
    return "".join(char if char.isprintable() else "?" for char in domain[:MAX_DOMAIN_CHARS]).strip()


def marked(extra: Mapping[str, Any] | None, terms: Terms | None) -> dict[str, Any] | None:
    """The extra arguments of a request with the mark of these terms, and with no other; None for none at all.

    Either one opts the request out; only the header can opt it in.
    """
    others = {name: value for name, value in (extra or {}).items() if name != KEY}
    if terms is None:
        return others or None
    return {**others, KEY: asdict(terms.with_words(_argument_words(others.get(OPT_OUT, "")) - {OPT_IN}))}


def _argument_words(says: Any) -> frozenset[str]:
    """An argument that is none of the words opts out: nobody tells its sender that it is misspelt."""
    try:
        return capture_words(says)
    except (UnknownTermsError, AttributeError):
        return _REFUSE


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
