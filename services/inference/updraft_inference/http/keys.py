"""API keys: which clients are allowed, and how many requests each may have at once.

The key file has one key per line (see `updraft_tap.http.holders`) and can be replaced without a restart. Only digests are
kept, and all of them are compared in constant time. Without a file no key is required. Probes and metrics need no key.
"""

import hashlib
import hmac
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from updraft_chassis.credentials import AUTHORIZATION, SCHEME, ReloadingFile, check_token, read_text
from updraft_chassis.errors import Exhausted, InvalidInput
from updraft_inference.http.errors import ApiError
from updraft_tap.http.holders import Holder, parse_line
from updraft_tap.http.terms import UnknownTermsError, tenant_named

MIN_KEY_CHARACTERS = 16
"""Shorter keys can be guessed; `openssl rand -hex 32` makes 64 characters."""


_NOBODY = Holder("", is_gateway=True)
"""No key is required, so a header may name the tenant."""


@dataclass(frozen=True, slots=True)
class Client:
    """The client behind an admitted request. `id` is the same for all requests of one key, and empty if no key is required.

    `reserve` sets how many requests this one counts as. `tenant` is the SHA-256 of its name, in hexadecimal; empty for none.
    `words` of X-Updraft-Capture hold for all requests of the key, and so do its `retention_s` and its `region`.
    """

    id: str
    reserve: Callable[[int], None]
    tenant: str = ""
    words: frozenset[str] = frozenset()
    retention_s: int = 0
    region: str = ""


class Keys:
    """Admits requests by their key. `max_at_once` limits concurrent requests per key, counting each choice; 0: no limit.

    `tenant_header` names the tenant of requests without a key or with a gateway's; empty: no header does.
    """

    def __init__(self, file: Path | None = None, *, max_at_once: int = 0, tenant_header: str = "") -> None:
        self._tenant_header = tenant_header.lower()
        self._holders = None if file is None else ReloadingFile([file], lambda: _read(file), what="API keys file")
        self._max_at_once = max_at_once
        self._inside: Counter[bytes] = Counter()

    @contextmanager
    def admitted(self, headers: Mapping[str, str]) -> Iterator[Client]:
        """Count the request for the duration of the block, as one until the client reserves more.

        Raises ApiError 401 without a known key, Exhausted while the key has too many requests, and InvalidInput if it
        asks for more than the limit or has an invalid header with the tenant.
        """
        key, holder = self._known(headers.get(AUTHORIZATION, ""))
        tenant = holder.tenant_of(self._named(headers))
        num_held = 0

        def reserve(num: int) -> None:
            nonlocal num_held
            if key is not None:
                self._check(num, others=self._inside[key] - num_held)
                self._inside[key] += num - num_held
                num_held = num

        try:
            reserve(1)
            client = "" if key is None else key.hex()
            yield Client(client, reserve, tenant, holder.words, holder.retention_s, holder.region)
        finally:
            if key is not None:
                self._inside[key] -= num_held
                if not self._inside[key]:
                    del self._inside[key]

    def _check(self, num: int, *, others: int) -> None:
        most = self._max_at_once or num + others
        if num > most:
            raise InvalidInput(
                f"n is {num}, but an API key may have at most {most} concurrent requests, counting each choice"
            )
        if num + others > most:
            raise Exhausted(f"This API key already has {others} of at most {most} concurrent requests")

    def _named(self, headers: Mapping[str, str]) -> str:
        """The tenant in the header; "" for none. Headers of a request may have several items with one name."""
        try:
            return tenant_named(
                [value.encode("latin-1") for name, value in headers.items() if name == self._tenant_header]
            )
        except UnknownTermsError as error:
            raise InvalidInput(str(error)) from None

    def _known(self, authorization: str) -> tuple[bytes | None, Holder]:
        """The digest of the key that was sent, None if no key is required, and whose it is."""
        if self._holders is None:
            return None, _NOBODY
        holders = self._holders.get()
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != SCHEME.lower() or not key.strip():
            message = "You didn't provide an API key. Send it as `Authorization: Bearer YOUR_KEY`"
            raise ApiError(401, message, code="invalid_api_key")
        digest = _digest(key.strip())
        # No early exit, so that the time does not depend on which key it is.
        if not any([hmac.compare_digest(digest, known) for known in holders]):  # noqa: C419 - a list: see above
            raise ApiError(401, "Incorrect API key provided", code="invalid_api_key")
        return digest, holders[digest]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read(file: Path) -> Mapping[bytes, Holder]:
    """Holders by the digests of their keys. Raises InvalidInput that names the line, never its content."""
    holders: dict[bytes, Holder] = {}
    for number, line in enumerate(read_text(file, "API keys").splitlines(), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            where = f"line {number} of {file}"
            try:
                key, holder = parse_line(text)
            except ValueError as error:
                raise InvalidInput(f"{where} {error}") from None
            if len(check_token(key, where)) < MIN_KEY_CHARACTERS:
                raise InvalidInput(
                    f"the key in {where} has {len(key)} characters, expected {MIN_KEY_CHARACTERS} or more"
                )
            if holders.setdefault(_digest(key), holder) is not holder:
                raise InvalidInput(f"the key in {where} is also in an earlier line")
    if not holders:
        raise InvalidInput(f"the API keys file {file} contains no key, so no request could be authorized")
    return holders
