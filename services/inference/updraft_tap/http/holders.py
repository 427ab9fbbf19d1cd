"""Lines of an API keys file: a key, whose it is, and what requests with it permit. Pure.

    KEY
    NAME KEY
    NAME KEY WORDS

NAME is the tenant, and several keys may have the same one. A key without a name is a tenant of its own. WORDS are those of
X-Updraft-Capture, separated by commas. They hold for every request with the key, which can only permit less. The word
`gateway` is for the key of a gateway, which may name the tenant of each request in a header. `retain=30d` (or `12h`) is the age
at which traces of the key's requests are deleted, and `region=NAME` the only region in which they may be stored.
"""

import hashlib
import re
from dataclasses import dataclass

from updraft_tap.http.terms import UnknownTermsError, capture_words, tenant_digest

EXPECTED = "expected KEY, NAME KEY, or NAME KEY WORDS"

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._@-]{0,126}[A-Za-z0-9])?")
_ID_CHARS = 12
_GATEWAY = "gateway"
_RETAIN = re.compile(r"retain=(?P<count>[1-9][0-9]{0,4})(?P<unit>[hd])")
_REGION = re.compile(r"region=(?P<name>[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)")
_SECONDS = {"h": 3600, "d": 86_400}
_WORDS = "on, off, no-train, no-retain, gateway, retain=30d (or 12h) or region=NAME"


@dataclass(frozen=True, slots=True)
class Holder:
    """`tenant` is the SHA-256 of the tenant's name, in hexadecimal. `words`: see `terms.capture_words`."""

    tenant: str
    words: frozenset[str] = frozenset()
    is_gateway: bool = False
    """A header may name the tenant of its requests instead."""
    retention_s: int = 0
    """Age at which its traces are deleted; 0: as all others."""
    region: str = ""
    """The only one in which its traces may be stored; empty: any."""

    def tenant_of(self, named: str) -> str:
        """The tenant of a request in whose header `named` is; "" if it has none."""
        return named if named and self.is_gateway else self.tenant


def parse_line(line: str) -> tuple[str, Holder]:
    """The key in a line that is not blank, and its holder. Raises ValueError with what is wrong, without the key."""
    name, key, words = _parts(line.split())
    if name and not _NAME.fullmatch(name):
        raise ValueError("has no valid name of a tenant: expected up to 128 letters, digits, '.', '_', '@' and '-'")
    every = {word.strip().lower() for word in words.split(",")}
    ages, regions = ([found for word in every if (found := form.fullmatch(word))] for form in (_RETAIN, _REGION))
    if len(ages) > 1 or len(regions) > 1:
        raise ValueError("has two ages or two regions after its key")
    others = every - {_GATEWAY, *(found[0] for found in (*ages, *regions))}
    try:
        tenant, permitted = tenant_digest((name or name_of_key(key)).encode()), capture_words(",".join(others))
    except UnknownTermsError:  # its message repeats a word, which may be a key
        raise ValueError(f"has an unknown word after its key: expected {_WORDS}") from None
    return key, Holder(
        tenant,
        permitted,
        is_gateway=_GATEWAY in every,
        retention_s=sum(int(found["count"]) * _SECONDS[found["unit"]] for found in ages),
        region="".join(found["name"] for found in regions),
    )


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
