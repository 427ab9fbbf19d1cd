"""API keys: who may ask, and how much at once.

A file has one key a line; what rotates it needs no restart. Only digests of keys are kept, and all of them are compared in
constant time. Without a file everybody may ask. Probes and metrics need no key.
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
"""Less can be guessed: `openssl rand -hex 32` makes 64."""


@dataclass(frozen=True, slots=True)
class Client:
    """A request that was let in. `id` is the same for all of one key, and empty where nobody needs one."""

    id: str
    reserve: Callable[[int], None]


class Keys:
    """Lets requests in by their key. `max_at_once`: requests of one key, each choice being one; 0: no limit."""

    def __init__(self, file: Path | None = None, *, max_at_once: int = 0) -> None:
        self._digests = None if file is None else ReloadingFile([file], lambda: _read(file), what="API keys file")
        self._max_at_once = max_at_once
        self._inside: Counter[bytes] = Counter()

    @contextmanager
    def admitted(self, headers: Mapping[str, str]) -> Iterator[Client]:
        """Inside for the length of the block, as one request until the client is told that it is several.

        ApiError 401 without a known key, Exhausted where it asks too much at once, InvalidInput where it always would.
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
            raise InvalidInput(f"n is {num}, and an API key has {most} requests at once, each choice being one")
        if num + others > most:
            raise Exhausted(f"{others} requests of this API key are being answered, and {most} is the most at once")

    def _known(self, authorization: str) -> bytes | None:
        """The digest of the key that was shown; None: none is needed."""
        if self._digests is None:
            return None
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != SCHEME.lower() or not key.strip():
            message = "You didn't provide an API key: send it as `Authorization: Bearer YOUR_KEY`"
            raise ApiError(401, message, code="invalid_api_key")
        shown, found = _digest(key.strip()), None
        for known in self._digests.get():  # all of them, whichever it is
            if hmac.compare_digest(shown, known):
                found = known
        if found is None:
            raise ApiError(401, "Incorrect API key provided: it is not known to this server", code="invalid_api_key")
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read(file: Path) -> frozenset[bytes]:
    """Digests of the keys. InvalidInput names the line, and never what stands there."""
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
        raise InvalidInput(f"the API keys file {file} holds no key: nobody could ask")
    return frozenset(digests)
