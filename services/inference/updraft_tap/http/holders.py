"""Lines of an API keys file: a key, whose it is, and what requests with it permit. Pure.

    KEY
    NAME KEY
    NAME KEY WORDS

NAME is the tenant, and several keys may have the same one. A key without a name is a tenant of its own. WORDS are those of
X-Updraft-Capture, separated by commas. They hold for every request with the key, which can only permit less. The word
`gateway` is for the key of a gateway, which may name the tenant of each request in a header.
"""

import hashlib
import re
from dataclasses import dataclass

from updraft_tap.http.terms import UnknownTermsError, capture_words, tenant_digest

EXPECTED = "expected KEY, NAME KEY, or NAME KEY WORDS"

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._@-]{0,126}[A-Za-z0-9])?")
_ID_CHARS = 12
_GATEWAY = "gateway"


@dataclass(frozen=True, slots=True)
class Holder:
    """`tenant` is the SHA-256 of the tenant's name, in hexadecimal. `words`: see `terms.capture_words`."""

    tenant: str
    words: frozenset[str] = frozenset()
    is_gateway: bool = False
    """A header may name the tenant of its requests instead."""

    def tenant_of(self, named: str) -> str:
        """The tenant of a request in whose header `named` is; "" if it has none."""
        return named if named and self.is_gateway else self.tenant


def parse_line(line: str) -> tuple[str, Holder]:
    """The key in a line that is not blank, and its holder. Raises ValueError with what is wrong, without the key."""
    name, key, words = _parts(line.split())
    if name and not _NAME.fullmatch(name):
        raise ValueError("has no valid name of a tenant: expected up to 128 letters, digits, '.', '_', '@' and '-'")
    every = {word.strip().lower() for word in words.split(",")}
    try:
        tenant, permitted = (
            tenant_digest((name or name_of_key(key)).encode()),
            capture_words(",".join(every - {_GATEWAY})),
        )
    except UnknownTermsError:  # its message repeats a word, which may be a key
        raise ValueError(
            "has an unknown word after its key: expected on, off, no-train, no-retain or gateway"
        ) from None
    return key, Holder(tenant, permitted, is_gateway=_GATEWAY in every)


def name_of_key(key: str) -> str:
    """The tenant of a key without a name: `key-` and the first 12 digits of its SHA-256."""
    return f"key-{hashlib.sha256(key.encode()).hexdigest()[:_ID_CHARS]}"


def _parts(words: list[str]) -> tuple[str, str, str]:
    match words:
        case [key]:
            return "", key, ""
        case [name, key]:
            return name, key, ""
        case [name, key, capture]:
            return name, key, capture
    raise ValueError(f"is no token: {EXPECTED}")
