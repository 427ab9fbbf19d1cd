"""The operator's tokens for registries: one per registry, of its own ServiceAccount, requested from the API server.

A registry runs in its users' namespace, and they may read what it receives. So each registry has its own audience, and others
refuse its tokens. Rejected: a token in the operator's pod, which has only one audience; and tokens of accounts in the users'
namespaces, for which the operator would need the right to act as any account there.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from updraft_chassis.clock import Clock
from updraft_chassis.errors import Unavailable, UpdraftError

TOKEN_S = 3600
_RENEWED_AT = 0.8
"""Fraction of a token's lifetime after which it is renewed; the kubelet uses the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    value: str
    renewed_s: float
    """When to request a new token; monotonic."""
    expires_s: float


class RegistryTokens:
    """`request` takes an audience and a lifetime in seconds and returns a token; it raises UpdraftErrors."""

    def __init__(self, request: Callable[[str, int], Awaitable[str]], clock: Clock, life_s: int = TOKEN_S) -> None:
        self._request = request
        self._clock = clock
        self._life_s = life_s
        self._tokens: dict[str, Token] = {}

    async def token(self, audience: str) -> Token:
        """A token for this audience: a new one if it is time, else the known one. Raises Unavailable without a valid one."""
        known, now_s = self._tokens.get(audience), self._clock.monotonic()
        if known is not None and now_s < known.renewed_s:
            return known
        try:
            value = await self._request(audience, self._life_s)
        except UpdraftError as error:
            if known is not None and now_s < known.expires_s:
                return known
            raise Unavailable(f"the operator gets no token for {audience} from the API server: {error}") from error
        token = Token(value=value, renewed_s=now_s + _RENEWED_AT * self._life_s, expires_s=now_s + self._life_s)
        self._tokens[audience] = token
        return token

    def forget(self, audience: str) -> None:
        self._tokens.pop(audience, None)
