"""API keys: which clients are allowed, and how many requests each may have at once.

The same file and the same answers as those of the embedded engine (`updraft_inference.http.keys`), without its packages. The
file has one key per line (see `holders`) and can be replaced without a restart. Only digests are kept, and all of them are
compared in constant time.
"""

import hashlib
import hmac
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from updraft_tap.http.holders import Holder, parse_line
from updraft_tap.http.reloading import ReloadingFiles

MIN_KEY_CHARACTERS = 16
"""Shorter keys can be guessed; `openssl rand -hex 32` makes 64 characters."""

_MAX_FILE_BYTES = 1 << 20


class KeysError(ValueError):
    """The keys file is invalid. The message names the line, never its content."""


class RefusedRequestError(Exception):
    """A request that is not let in: HTTP status, a message for the client, and OpenAI's code."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


class Keys:
    """Admits requests by their key. `max_at_once` limits concurrent requests per key, counting each choice; 0: no limit.

    Raises KeysError if the file is invalid. Used by one thread.
    """

    def __init__(self, file: Path, *, max_at_once: int = 0) -> None:
        self.max_at_once = max_at_once
        self._newest = ReloadingFiles([file], lambda: _read(file), what="API keys file")
        self._digests = self._newest.get()
        self._inside: Counter[bytes] = Counter()

    @contextmanager
    def admitted(self, key: str) -> Iterator[Callable[[int], None]]:
        """Count the request for the duration of the block, as one until the function is called with how many it is.

        Both raise RefusedRequestError: 401 without a known key, 429 while the key has too many requests, 400 if one asks for
        more than the limit.
        """
        digest, num_held = self._known(key), 0

        def reserve(num: int) -> None:
            nonlocal num_held
            self._check(num, others=self._inside[digest] - num_held)
            self._inside[digest] += num - num_held
            num_held = num

        try:
            reserve(1)
            yield reserve
        finally:
            self._inside[digest] -= num_held
            if not self._inside[digest]:
                del self._inside[digest]

    def holder(self, key: str) -> Holder:
        """Whose an admitted key is."""
        return self._digests[_digest(key)]

    def _check(self, num: int, *, others: int) -> None:
        most = self.max_at_once or num + others
        if num > most:
            message = f"n is {num}, but an API key may have at most {most} concurrent requests, counting each choice"
            raise RefusedRequestError(400, message)
        if num + others > most:
            message = f"This API key already has {others} of at most {most} concurrent requests"
            raise RefusedRequestError(429, message, "rate_limit_exceeded")

    def _known(self, key: str) -> bytes:
        if not key:
            message = "You didn't provide an API key. Send it as `Authorization: Bearer YOUR_KEY`"
            raise RefusedRequestError(401, message, "invalid_api_key")
        self._digests, digest = self._newest.get(), _digest(key)
        # No early exit, so that the time does not depend on which key it is.
        if not any([hmac.compare_digest(digest, known) for known in self._digests]):  # noqa: C419 - a list: see above
            raise RefusedRequestError(401, "Incorrect API key provided", "invalid_api_key")
        return digest


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read(file: Path) -> Mapping[bytes, Holder]:
    """Holders by the digests of their keys. Raises KeysError."""
    holders: dict[bytes, Holder] = {}
    for number, line in enumerate(_text(file).splitlines(), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            where = f"line {number} of {file}"
            try:
                key, holder = parse_line(text)
            except ValueError as error:
                raise KeysError(f"{where} {error}") from None
            _check_key(key, where)
            if holders.setdefault(_digest(key), holder) is not holder:
                raise KeysError(f"the key in {where} is also in an earlier line")
    if not holders:
        raise KeysError(f"the API keys file {file} contains no key, so no request could be authorized")
    return holders


def _text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise KeysError(f"the API keys file {file} has more than {_MAX_FILE_BYTES} bytes")
        return content.decode("ascii")
    except OSError as error:
        raise KeysError(f"cannot read the API keys file {file}: {error}") from error
    except UnicodeDecodeError:
        raise KeysError(f"the API keys file {file} is not ASCII text") from None


def _check_key(text: str, where: str) -> None:
    if not text.isprintable() or " " in text:
        raise KeysError(f"{where} is no token: expected one word of printable ASCII")
    if len(text) < MIN_KEY_CHARACTERS:
        raise KeysError(f"the key in {where} has {len(text)} characters, expected {MIN_KEY_CHARACTERS} or more")
