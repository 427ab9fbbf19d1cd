"""Secrets, as far as the operator reads them: its own, by name, and whether those that a spec names are there.

Read by name and kept for a minute. Refused: to list or watch Secrets, a right that would show it everyone's.
"""

import base64
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from updraft_chassis.clock import Clock
from updraft_chassis.errors import Forbidden, NotFound
from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.redis import KEY
from updraft_operator.manifests.registry import ROLES
from updraft_operator.planning.objects import Key
from updraft_operator.planning.observed import Access
from updraft_operator.watching.cluster import Cluster

FRESH_S = 60.0
_TOKEN_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was found, and when."""

    access: Access
    missing: tuple[str, ...]
    at_s: float
    generation: int


class Secrets:
    """Reads them, and remembers for a little while."""

    def __init__(self, cluster: Cluster, clock: Clock, fresh_s: float = FRESH_S) -> None:
        self._cluster = cluster
        self._clock = clock
        self._fresh_s = fresh_s
        self._found: dict[Key, Found] = {}

    async def look(self, key: Key, owner: AdaptiveSpeculator) -> Found:
        """Of a speculator: its own Secret, and those that its spec names and that are not there."""
        found, now_s = self._found.get(key), self._clock.monotonic()
        if found is not None and found.generation == owner.metadata.generation and now_s - found.at_s < self._fresh_s:
            return found
        missing = [name for name, entry in named(owner) if not await self._has(key.namespace, name, entry)]
        found = Found(
            access=_access(await self._read(key.namespace, names.child(key.name, "access"))),
            missing=tuple(dict.fromkeys(missing)),
            at_s=now_s,
            generation=owner.metadata.generation,
        )
        self._found[key] = found
        return found

    def forget(self, key: Key) -> None:
        """Read anew the next time."""
        self._found.pop(key, None)

    async def entry(self, namespace: str, name: str, entry: str) -> str:
        """One value; empty if it is not there."""
        return (await self._read(namespace, name) or {}).get(entry, "")

    async def _has(self, namespace: str, name: str, entry: str) -> bool:
        try:
            found = await self._read(namespace, name)
        except Forbidden:  # it may exist; the pods will tell
            return True
        return found is not None and (not entry or entry in found)

    async def _read(self, namespace: str, name: str) -> Mapping[str, str] | None:
        try:
            secret = await self._cluster.get("Secret", namespace, name)
        except NotFound:
            return None
        return {entry: _text(value) for entry, value in (secret.get("data") or {}).items()}


def named(owner: AdaptiveSpeculator) -> Iterator[tuple[str, str]]:
    """Secrets that a spec names, each with the entry that is needed; empty: any."""
    spec = owner.spec
    if spec.target_model.secret_ref is not None:
        yield spec.target_model.secret_ref.name, ""
    if spec.traces.redis is not None:
        yield spec.traces.redis.url_secret_ref.name, spec.traces.redis.url_secret_ref.key
    if spec.registry.bucket is not None and spec.registry.bucket.secret_ref is not None:
        yield spec.registry.bucket.secret_ref.name, ""


def fresh_tokens(roles: Iterable[str] = ROLES) -> dict[str, str]:
    """Random ones."""
    return {role: secrets.token_hex(_TOKEN_BYTES) for role in roles}


def _access(secret: Mapping[str, Any] | None) -> Access:
    if secret is None:
        return Access()
    tokens = {role: str(secret[role]) for role in ROLES if secret.get(role)}
    return Access(tokens=tokens, redis_url=str(secret.get(KEY, "")), exists=True)


def _text(value: str) -> str:
    return base64.b64decode(value).decode(errors="replace")
