"""Tokens of Kubernetes ServiceAccounts: which ones are valid here, and which roles their accounts have.

A token is valid if a key of the cluster signed it, this cluster issued it (`issuer`) for this registry (`audience`), and it has
not expired. Its subject is an account, for which the registry's settings have roles. Rejected: TokenReview, for which the API
server has to answer each call, with a permission that covers all tokens of the cluster. Therefore, the token of a deleted
account or pod stays valid until it expires.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt

from updraft_chassis.access import Caller, Grant, Role
from updraft_chassis.clock import Clock
from updraft_chassis.errors import InvalidInput, Unauthenticated
from updraft_registry.identity.keys import KeySet

LEEWAY_S = 30
"""How far the clocks of this pod and the API server may differ."""

_SUBJECT = "system:serviceaccount:"
_REQUIRED = ["exp", "iat", "nbf", "iss", "aud", "sub"]
_ENTRY = re.compile(
    r"(?P<grant>[a-z]+(@[a-z0-9.-]{1,253})?):(?P<namespace>[a-z0-9-]{1,63})/(?P<name>[a-z0-9.-]{1,253})"
)
_MAX_SHOWN = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The claims of a valid token."""

    issuer: str
    audience: str
    accounts: Mapping[str, frozenset[Grant]]
    """Grants by subject, `system:serviceaccount:NAMESPACE:NAME`."""


class ServiceAccounts:
    """An authority for tokens of ServiceAccounts; see `updraft_chassis.access`."""

    def __init__(self, expected: Expected, keys: KeySet, clock: Clock) -> None:
        self._expected = expected
        self._keys = keys
        self._clock = clock

    async def caller(self, token: str) -> Caller | None:
        """None if this is not a JSON Web Token. Unauthenticated, with the reason, if it is not valid here."""
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            return None
        claims = await self._verified(token, header)
        subject = str(claims["sub"])
        grants = self._expected.accounts.get(subject)
        if grants is None:
            raise Unauthenticated(f"{_shown(subject)} has no role in this registry")
        valid_s = int(claims["exp"]) + LEEWAY_S - self._clock.now()
        return Caller(grants=grants, valid_s=valid_s, pod=_pod(claims))

    async def _verified(self, token: str, header: Mapping[str, Any]) -> Mapping[str, Any]:
        key = await self._keys.key(str(header.get("kid", "")))
        try:
            claims: Mapping[str, Any] = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                issuer=self._expected.issuer,
                audience=self._expected.audience,
                leeway=LEEWAY_S,
                options={"require": _REQUIRED},
            )
        except jwt.PyJWTError as error:
            raise Unauthenticated(self._reason(error, key.algorithm_name)) from error
        return claims

    def _reason(self, error: jwt.PyJWTError, algorithm: str) -> str:
        reasons: dict[type[jwt.PyJWTError], str] = {
            jwt.ExpiredSignatureError: "has expired; perhaps the file that it was read from is not renewed",
            jwt.ImmatureSignatureError: f"is not valid yet; clocks may differ by at most {LEEWAY_S} s",
            jwt.InvalidAudienceError: f"is for another audience than {self._expected.audience}",
            jwt.InvalidIssuerError: f"is from another issuer than {self._expected.issuer}",
            jwt.InvalidAlgorithmError: f"is not signed with {algorithm}, the algorithm of its key",
            jwt.InvalidSignatureError: "has a wrong signature",
        }
        return f"the call's token {reasons.get(type(error), f'is not valid: {error}')}"


def parse_accounts(text: str) -> dict[str, frozenset[Grant]]:
    """Grants by subject, from `role:namespace/name` or `serve@speculator:namespace/name` entries separated by commas.

    InvalidInput for anything else.
    """
    accounts: dict[str, frozenset[Grant]] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = _ENTRY.fullmatch(entry)
        grant = Grant.parse(match["grant"]) if match else None
        if match is None or grant is None:
            raise InvalidInput(
                f"{entry[:_MAX_SHOWN]!r} is not role:namespace/name with one of the roles {', '.join(Role)}, or"
                " serve@speculator:namespace/name"
            )
        subject = f"{_SUBJECT}{match['namespace']}:{match['name']}"
        accounts[subject] = accounts.get(subject, frozenset()) | {grant}
    return accounts


def _pod(claims: Mapping[str, Any]) -> str:
    """The pod for which the kubelet requested the token; empty for a token that someone requested for the account."""
    bound = claims.get("kubernetes.io")
    pod = bound.get("pod") if isinstance(bound, dict) else None
    return str(pod.get("name", "")) if isinstance(pod, dict) else ""


def _shown(subject: str) -> str:
    """A signed subject, without its prefix."""
    return f"ServiceAccount {subject.removeprefix(_SUBJECT)[:_MAX_SHOWN]!r}"
