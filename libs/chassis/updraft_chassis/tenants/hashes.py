"""Keyed hashes of tenants: HMAC-SHA-256 with a salt per speculator over the SHA-256 of a name, 64 bits of it. Pure.

Without the salt, nobody finds a name by hashing guesses. With another salt, the same name has another hash, so two speculators
cannot compare their tenants. 0 is no tenant. In texts a hash is 16 hexadecimal digits.
"""

import hashlib
import hmac
import re
import secrets

from updraft_chassis.errors import InvalidInput

SALT_BYTES = 32
MAX_NAME_CHARS = 256

_BYTES = 8
_SPACES = " \t\n\r\v\f"
"""Others, such as U+00A0, may be a part of a character in the bytes of a header."""
_TEXT = re.compile(rf"[0-9a-f]{{{2 * _BYTES}}}")


def new_salt() -> bytes:
    return secrets.token_bytes(SALT_BYTES)


def digest(name: str) -> str:
    """The SHA-256 of a name without ASCII spaces around it, in hexadecimal: the processes of a pod tell each other this of a
    tenant. InvalidInput for a name that pods refuse too (`updraft_tap.http.terms`)."""
    stripped = name.strip(_SPACES)
    if not 0 < len(stripped) <= MAX_NAME_CHARS or not stripped.isprintable():
        raise InvalidInput(f"the name of a tenant is 1 to {MAX_NAME_CHARS} printable characters")
    return hashlib.sha256(stripped.encode()).hexdigest()


def keyed(name_digest: str, salt: bytes) -> int:
    """The hash of the tenant whose name has this digest: from 1 to 2^64 - 1."""
    mac = hmac.digest(salt, name_digest.encode(), "sha256")
    return int.from_bytes(mac[:_BYTES]) or 1


def text(tenant: int) -> str:
    """A hash in hexadecimal; empty for no tenant."""
    return f"{tenant:0{2 * _BYTES}x}" if tenant else ""


def parse(written: str) -> int:
    """The hash in a text; 0 if the text is none."""
    return int(written, 16) if _TEXT.fullmatch(written) else 0
