"""The operator's token for a registry: a token of its own ServiceAccount for one audience, requested from the API server.

A registry runs in its users' namespace, and they may read what it receives. So each registry has its own audience, and others
refuse its tokens. Rejected: a token in the operator's pod, which has only one audience; and tokens of accounts in the users'
namespaces, for which the operator would need the right to act as any account there.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from updraft_chassis import rpc
from updraft_chassis.clock import Clock
from updraft_chassis.errors import Unavailable, UpdraftError

TOKEN_S = 3600
_RENEWED_AT = 0.8
"""Fraction of a token's lifetime after which it is renewed; the kubelet uses the same."""

TokenRequest: TypeAlias = Callable[[str, int], Awaitable[tuple[str, int]]]
"""Takes an audience and a lifetime in seconds; returns a token and its lifetime, which may be shorter. Raises UpdraftErrors."""


MOST_REQUESTS = 8
"""At the same time. A connection to the API server takes 260 kB, and lasts as long as it is used in turn."""

REQUEST_S = 20.0
"""How long a token is waited for, together with the requests before it."""


class FewRequests:
    """A `TokenRequest` that makes few of them at a time: a thousand registries need their first tokens at once."""

    def __init__(self, request: TokenRequest) -> None:
        self._request = request
        self._places = asyncio.Semaphore(MOST_REQUESTS)

    async def __call__(self, audience: str, seconds: int) -> tuple[str, int]:
        async with rpc.unavailable_after(REQUEST_S, f"no answer within {REQUEST_S:.0f} s"), self._places:
            return await self._request(audience, seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    value: str
    renewed_s: float
    """When to request a new token; monotonic."""
    expires_s: float


class RegistryToken:
    """The token for one audience, requested when it is first needed, and again before it expires."""

    def __init__(self, request: TokenRequest, audience: str, clock: Clock) -> None:
        self._request = request
        self._audience = audience
        self._clock = clock
        self._known: Token | None = None
        self._requesting = asyncio.Lock()

    async def get(self) -> Token:
        """A new token if it is time, else the known one. Raises Unavailable without a valid one."""
        async with self._requesting:
            known, now_s = self._known, self._clock.monotonic()
            if known is not None and now_s < known.renewed_s:
                return known
            try:
                value, life_s = await self._request(self._audience, TOKEN_S)
            except UpdraftError as error:
                if known is not None and self._clock.monotonic() < known.expires_s:
                    return known
                reason = f"the operator gets no token for {self._audience} from the API server: {error}"
                raise Unavailable(reason) from error
            renewed_s, expires_s = now_s + _RENEWED_AT * life_s, now_s + life_s
            self._known = Token(value=value, renewed_s=renewed_s, expires_s=expires_s)
            return self._known
