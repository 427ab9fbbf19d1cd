"""The operator's tokens for registries: its own ServiceAccount's, one per registry, requested from the API server.

A registry runs in its users' namespace, and they may read what it receives. So each has an audience of its own, and a token for
one registry is of no use at another. Rejected: a token in the operator's pod, which has one audience; and tokens of accounts
in the users' namespaces, for which the operator would need the right to act as any account there.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from updraft_chassis.clock import Clock
from updraft_chassis.errors import Unavailable, UpdraftError

TOKEN_S = 3600
_RENEWED_AT = 0.8
"""The part of its life after which a token is renewed; that of the kubelet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    value: str
    renewed_s: float
    """When a new one is requested; monotonic."""
    expires_s: float


class RegistryTokens:
    """`request` returns a token for an audience that is valid for so many seconds; it raises UpdraftErrors."""

    def __init__(self, request: Callable[[str, int], Awaitable[str]], clock: Clock, life_s: int = TOKEN_S) -> None:
        self._request = request
        self._clock = clock
        self._life_s = life_s
        self._tokens: dict[str, Token] = {}

    async def token(self, audience: str) -> Token:
        """A token for this audience. Unavailable if there is none; an older one is used as long as it is valid."""
        known, now_s = self._tokens.get(audience), self._clock.monotonic()
        if known is not None and now_s < known.renewed_s:
            return known
        try:
            value = await self._request(audience, self._life_s)
        except UpdraftError as error:
            if known is not None and now_s < known.expires_s:
                return known
            raise Unavailable(f"the API server gives the operator no token for {audience}: {error}") from error
        token = Token(value=value, renewed_s=now_s + _RENEWED_AT * self._life_s, expires_s=now_s + self._life_s)
        self._tokens[audience] = token
        return token

    def forget(self, audience: str) -> None:
        self._tokens.pop(audience, None)
