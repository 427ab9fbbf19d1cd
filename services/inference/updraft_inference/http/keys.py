"""API keys: which clients are allowed, and how many requests each may have at once.

The key file has one key per line and can be replaced without a restart. Only digests are kept, and all of them are
compared in constant time. Without a file no key is required. Probes and metrics need no key.
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

MIN_KEY_CHARACTERS = 16
"""Shorter keys can be guessed; `openssl rand -hex 32` makes 64 characters."""


@dataclass(frozen=True, slots=True)
class Client:
    """The client behind an admitted request. `id` is the same for all requests of one key, and empty if no key is required.

    `reserve` sets how many requests this one counts as.
    """

    id: str
    reserve: Callable[[int], None]


class Keys:
    """Admits requests by their key. `max_at_once` limits concurrent requests per key, counting each choice; 0: no limit."""

    def __init__(self, file: Path | None = None, *, max_at_once: int = 0) -> None:
        self._digests = None if file is None else ReloadingFile([file], lambda: _read(file), what="API keys file")
        self._max_at_once = max_at_once
        self._inside: Counter[bytes] = Counter()

    @contextmanager
    def admitted(self, headers: Mapping[str, str]) -> Iterator[Client]:
        """Count the request for the duration of the block, as one until the client reserves more.

        Raises ApiError 401 without a known key, Exhausted while the key has too many requests, and InvalidInput if it
        asks for more than the limit.
        """
        key = self._known(headers.get(AUTHORIZATION, ""))
        num_held = 0

        def reserve(num: int) -> None:
            nonlocal num_held
            if key is not None:
                self._check(num, others=self._inside[key] - num_held)
                self._inside[key] += num - num_held
                num_held = num

        try:
            reserve(1)
            yield Client("" if key is None else key.hex(), reserve)
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

    def _known(self, authorization: str) -> bytes | None:
        """The digest of the key that was sent; None if no key is required."""
        if self._digests is None:
            return None
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != SCHEME.lower() or not key.strip():
            message = "You didn't provide an API key. Send it as `Authorization: Bearer YOUR_KEY`"
            raise ApiError(401, message, code="invalid_api_key")
        digest = _digest(key.strip())
        # No early exit, so that the time does not depend on which key it is.
        if not any([hmac.compare_digest(digest, known) for known in self._digests.get()]):  # noqa: C419 - a list: see above
            raise ApiError(401, "Incorrect API key provided", code="invalid_api_key")
        return digest


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read(file: Path) -> frozenset[bytes]:
    """Digests of the keys. Raises InvalidInput that names the line, never its content."""
    digests = set()
    for number, line in enumerate(read_text(file, "API keys").splitlines(), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            where = f"line {number} of {file}"
            if len(check_token(text, where)) < MIN_KEY_CHARACTERS:
                raise InvalidInput(
                    f"the key in {where} has {len(text)} characters, expected {MIN_KEY_CHARACTERS} or more"
                )
            digests.add(_digest(text))
    if not digests:
        raise InvalidInput(f"the API keys file {file} contains no key, so no request could be authorized")
    return frozenset(digests)
