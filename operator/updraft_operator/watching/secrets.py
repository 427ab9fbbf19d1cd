"""Secrets that the operator reads: its own, and whether those that a spec names exist.

They are read by name and cached for a minute. Refused: listing or watching Secrets, because that permission would
expose every Secret.
"""

import base64
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from updraft_chassis.clock import Clock
from updraft_chassis.errors import Forbidden, NotFound
from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.redis import KEY, MARK_KEY
from updraft_operator.planning.objects import Key
from updraft_operator.planning.observed import AccessSecret
from updraft_operator.watching.cluster import Cluster

FRESH_S = 60.0
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretsSnapshot:
    access: AccessSecret
    missing: tuple[str, ...]
    at_s: float
    generation: int


NO_SECRETS = SecretsSnapshot(access=AccessSecret(), missing=(), at_s=0.0, generation=0)


class Secrets:
    """Reads Secrets and caches them for `fresh_s` seconds."""

    def __init__(self, cluster: Cluster, clock: Clock, fresh_s: float = FRESH_S) -> None:
        self._cluster = cluster
        self._clock = clock
        self._fresh_s = fresh_s
        self._snapshots: dict[Key, SecretsSnapshot] = {}

    async def read(self, key: Key, owner: AdaptiveSpeculator) -> SecretsSnapshot:
        """The speculator's own Secret, and the names of Secrets that its spec names and that do not exist."""
        snapshot, now_s = self._snapshots.get(key), self._clock.monotonic()
        is_same = snapshot is not None and snapshot.generation == owner.metadata.generation
        if snapshot is not None and is_same and now_s - snapshot.at_s < self._fresh_s:
            return snapshot
        missing = [name for name, entry in named(owner) if not await self._has(key.namespace, name, entry)]
        snapshot = SecretsSnapshot(
            access=_access(await self._get(key.namespace, names.child(key.name, "access")) or {}),
            missing=tuple(dict.fromkeys(missing)),
            at_s=now_s,
            generation=owner.metadata.generation,
        )
        self._snapshots[key] = snapshot
        return snapshot

    def forget(self, key: Key) -> None:
        self._snapshots.pop(key, None)

    async def entry(self, namespace: str, name: str, entry: str) -> str:
        return (await self._get(namespace, name) or {}).get(entry, "")

    async def _has(self, namespace: str, name: str, entry: str) -> bool:
        try:
            snapshot = await self._get(namespace, name)
        except Forbidden:  # it may exist; otherwise the pods report it
            return True
        return snapshot is not None and (not entry or entry in snapshot)

    async def _get(self, namespace: str, name: str) -> Mapping[str, str] | None:
        try:
            secret = await self._cluster.get("Secret", namespace, name)
        except NotFound:
            return None
        return {
            entry: base64.b64decode(value).decode(errors="replace")
            for entry, value in (secret.get("data") or {}).items()
        }


def named(owner: AdaptiveSpeculator) -> Iterator[tuple[str, str]]:
    """Secrets that a spec names, each with the required entry; empty: any entry."""
    spec = owner.spec
    if spec.target_model.secret_ref is not None:
        yield spec.target_model.secret_ref.name, ""
    if spec.serving.api_keys_secret_ref is not None:
        yield spec.serving.api_keys_secret_ref.name, spec.serving.api_keys_secret_ref.key
    if spec.traces.redis is not None:
        yield spec.traces.redis.url_secret_ref.name, spec.traces.redis.url_secret_ref.key
    if spec.registry.bucket is not None and spec.registry.bucket.secret_ref is not None:
        yield spec.registry.bucket.secret_ref.name, ""


def fresh_key() -> str:
    return secrets.token_hex(_KEY_BYTES)


def _access(secret: Mapping[str, str]) -> AccessSecret:
    return AccessSecret(redis_url=secret.get(KEY, ""), mark_key=secret.get(MARK_KEY, ""))
