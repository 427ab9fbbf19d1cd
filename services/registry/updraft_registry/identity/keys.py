"""The keys with which a cluster signs the tokens of its ServiceAccounts (a JSON Web Key Set, RFC 7517).

They are fetched every few minutes, and at once for an unknown key ID, but at most every ten seconds, so that invented key IDs
cause no load. If the source is unreachable, the last keys stay valid. Each key has exactly one algorithm, that of its type: a
token cannot choose another one.
"""

import asyncio
import json
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import jwt

from updraft_chassis.clock import Clock
from updraft_chassis.credentials import read_text
from updraft_chassis.errors import InvalidInput, Unauthenticated, Unavailable, UpdraftError

logger = logging.getLogger(__name__)

REFRESH_S = 300.0
MIN_INTERVAL_S = 10.0

_TIMEOUT_S = 5.0
_MAX_BYTES = 1024 * 1024
_ALGORITHMS = {"RSA": "RS256", "EC": "ES256"}
_MIN_RSA_BITS = 2048
_MAX_SHOWN = 80


class KeySet:
    """Keys by key ID. `fetch` returns a JSON Web Key Set; it raises UpdraftErrors. `on_fetch` is told whether it succeeded."""

    def __init__(
        self, fetch: Callable[[], Awaitable[bytes]], clock: Clock, on_fetch: Callable[[bool], None] = lambda _: None
    ) -> None:
        self._fetch = fetch
        self._clock = clock
        self._on_fetch = on_fetch
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._fetched_s = float("-inf")
        self._problem = ""
        """Why the last fetch failed; empty if it succeeded."""
        self._fetching = asyncio.Lock()

    async def run(self) -> None:
        """Fetch periodically, until cancelled. After a failure, retry at the shortest interval."""
        while True:
            await self._refresh()
            await asyncio.sleep(MIN_INTERVAL_S if self._problem else REFRESH_S)

    async def key(self, key_id: str) -> jwt.PyJWK:
        """The key with this ID. Raises Unauthenticated if the cluster has none, Unavailable if it did not answer."""
        if key_id not in self._keys:
            await self._refresh()
        key = self._keys.get(key_id)
        if key is not None:
            return key
        unknown = f"the token is signed with key {key_id[:_MAX_SHOWN]!r}, which"
        if self._problem:
            raise Unavailable(f"{unknown} is not known yet, and the cluster's keys cannot be read: {self._problem}")
        raise Unauthenticated(f"{unknown} is not one of the cluster's")

    async def _refresh(self) -> None:
        """Fetch, unless the last fetch began a moment ago. Those who wait for a fetch share its result."""
        async with self._fetching:
            now_s = self._clock.monotonic()
            if now_s - self._fetched_s < MIN_INTERVAL_S:
                return
            self._fetched_s = now_s
            try:
                self._keys = parse(await self._fetch())
            except UpdraftError as error:
                self._note(str(error))
            else:
                self._note("")

    def _note(self, problem: str) -> None:
        self._on_fetch(not problem)
        if problem and not self._problem:
            extra = {"reason": problem, "num_keys": len(self._keys)}
            logger.warning("Cannot read the cluster's keys; known ones stay valid", extra=extra)
        elif self._problem and not problem:
            logger.info("The cluster's keys can be read again", extra={"num_keys": len(self._keys)})
        self._problem = problem


def parse(content: bytes) -> dict[str, jwt.PyJWK]:
    """The usable keys of a JSON Web Key Set by ID: RSA of 2,048 bits or more, and P-256. InvalidInput if there is none."""
    try:
        listed = json.loads(content)["keys"]
        entries = [entry for entry in listed if isinstance(entry, dict)]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InvalidInput("the answer is not a JSON Web Key Set") from None
    keys = {str(entry["kid"]): key for entry in entries if entry.get("kid") and (key := _key(entry)) is not None}
    if not keys:
        raise InvalidInput("the JSON Web Key Set has no RSA or P-256 key with an ID")
    return keys


def _key(entry: Mapping[str, Any]) -> jwt.PyJWK | None:
    """The key; None if its type, algorithm or use is another one, or if it is invalid."""
    algorithm = _ALGORITHMS.get(str(entry.get("kty")), "")
    if not algorithm or entry.get("alg", algorithm) != algorithm or entry.get("use", "sig") != "sig" or "d" in entry:
        return None
    try:
        key = jwt.PyJWK(dict(entry), algorithm)
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    return key if _is_strong(key) else None


def _is_strong(key: jwt.PyJWK) -> bool:
    if key.algorithm_name == "RS256":
        return bool(key.key.key_size >= _MIN_RSA_BITS)
    return bool(key.key.curve.name == "secp256r1")


async def read_file(file: Path) -> bytes:
    """A key set in a file; InvalidInput if it cannot be read."""
    return (await asyncio.to_thread(read_text, file, "key set")).encode()


async def read_url(url: str, *, token_file: Path | None, ca_file: Path | None) -> bytes:
    """A key set from an API server, with the token of this pod. Token and CA are read each time, because both are rotated.

    Unavailable without an answer, InvalidInput if the answer is an error or too long. Proxies in the environment are not used.
    """
    token = None if token_file is None else (await asyncio.to_thread(read_text, token_file, "token")).strip()
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        trusted = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
        async with (
            asyncio.timeout(_TIMEOUT_S),
            httpx.AsyncClient(verify=trusted, trust_env=False, timeout=_TIMEOUT_S) as client,
            client.stream("GET", url, headers=headers) as answer,
        ):
            if answer.status_code != httpx.codes.OK:
                raise InvalidInput(f"{url} answers with status {answer.status_code}")
            return await _limited(answer)
    except (httpx.HTTPError, OSError) as error:  # TimeoutError and SSLError are OSErrors
        raise Unavailable(f"{url} does not answer: {str(error) or type(error).__name__}") from error


async def _limited(answer: httpx.Response) -> bytes:
    content = b""
    async for part in answer.aiter_bytes():
        content += part
        if len(content) > _MAX_BYTES:
            raise InvalidInput(f"{answer.url} answers with more than {_MAX_BYTES} bytes")
    return content
