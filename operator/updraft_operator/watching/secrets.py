"""Secrets that the operator reads: its own, and whether those that a spec names exist.

They are read by name when a spec changes and again after `fresh_s`, sooner while one is missing. Refused: listing or watching
Secrets, because that permission would expose every Secret.
"""

import base64
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from updraft_chassis.clock import Clock
from updraft_chassis.errors import Conflict, Forbidden, InvalidInput, NotFound
from updraft_operator.api.speculator import AdaptiveSpeculator, Redis, RedisMode
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.redis import OURS, ROTATION, URL, Place, secret_name, url_secret
from updraft_operator.manifests.redis_users import Role
from updraft_operator.manifests.tls.objects import CA, CERT, KEY
from updraft_operator.manifests.tls.objects import secret_name as certificate_name
from updraft_operator.manifests.tls.terms import Certificate
from updraft_operator.planning.objects import Key
from updraft_operator.planning.observed import MissingSecret
from updraft_operator.watching.cluster import Cluster
from updraft_operator.watching.x509 import read_certificate

FRESH_S = 60.0
"""At most so long while a Secret is missing."""

_PASSWORD_BYTES = 32
_KEY = "key"


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretsSnapshot:
    redis_urls: Mapping[Role, str]
    """The addresses in the Secrets of the roles; none of a Secret that does not exist."""
    dedicated_urls: Mapping[Role, str] = field(default_factory=dict)
    """The same for a dedicated Redis."""
    certificates: Mapping[str, Certificate]
    """Those of the registry, of a dedicated Redis and of the ports of metrics, by part; none without a valid one."""
    missing: tuple[MissingSecret, ...]
    rotations: Mapping[Place, Mapping[Role, str]] = field(default_factory=dict)
    """By Redis and role, the request that the password was made for; empty for none."""
    at_s: float
    generation: int
    places: frozenset[Place] = frozenset()
    """Those whose Secrets were read."""
    request: str = ""


NO_SECRETS = SecretsSnapshot(redis_urls={}, certificates={}, missing=(), at_s=0.0, generation=0)


class Secrets:
    """Reads Secrets, and keeps them until they expire."""

    def __init__(self, cluster: Cluster, clock: Clock) -> None:
        self._cluster = cluster
        self._clock = clock
        self._fresh: set[Key] = set()
        self._snapshots: dict[Key, SecretsSnapshot] = {}

    def expire(self) -> None:
        """Read all again when they are next needed: nothing tells that a Secret has changed."""
        self._fresh.clear()

    def last(self, key: Key) -> SecretsSnapshot:
        """The last snapshot, however old."""
        return self._snapshots.get(key, NO_SECRETS)

    async def read(
        self,
        key: Key,
        owner: AdaptiveSpeculator,
        request: str = "",
        in_use: frozenset[Place] = frozenset(),
        parts: Collection[str] = (),
    ) -> SecretsSnapshot:
        """The speculator's own Secrets for the Redis that its spec wants and for those `in_use`, and the names of Secrets that
        its spec names and that do not exist. `parts` have certificates.

        `request` is the version of its Certificates, after whose changes cert-manager may have written another Secret.
        """
        in_use |= _wanted(owner)
        snapshot, now_s = self._snapshots.get(key), self._clock.monotonic()
        same = (owner.metadata.generation, in_use, request)
        is_same = snapshot is not None and (snapshot.generation, snapshot.places, snapshot.request) == same
        if snapshot is not None and is_same and key in self._fresh and not _is_due(snapshot, parts, now_s):
            return snapshot
        missing = [
            MissingSecret(name) for name, entry in named(owner) if not await self._has(key.namespace, name, entry)
        ]
        missing += await self._wrong_pairs(key.namespace, owner)
        held = {place: await self._of_roles(key, place, in_use) for place in OURS}
        snapshot = SecretsSnapshot(
            redis_urls={role: content.get(URL, "") for role, content in held[Place.SHARED].items()},
            dedicated_urls={role: content.get(URL, "") for role, content in held[Place.DEDICATED].items()},
            rotations={
                place: {role: content.get(ROTATION, "") for role, content in of_place.items()}
                for place, of_place in held.items()
            },
            certificates={part: found for part in parts if (found := await self._certificate(key, part)) is not None},
            missing=tuple(dict.fromkeys(missing)),
            at_s=now_s,
            generation=owner.metadata.generation,
            places=in_use,
            request=request,
        )
        self._snapshots[key] = snapshot
        self._fresh.add(key)
        return snapshot

    def forget(self, key: Key) -> None:
        self._snapshots.pop(key, None)

    async def _of_roles(self, key: Key, place: Place, in_use: frozenset[Place]) -> dict[Role, Mapping[str, str]]:
        if place not in in_use:
            return {}
        held = {role: await self._get(key.namespace, secret_name(key.name, role, place)) for role in Role}
        return {role: content for role, content in held.items() if content is not None}

    async def _certificate(self, key: Key, part: str) -> Certificate | None:
        held = await self._get(key.namespace, certificate_name(key.name, part)) or {}
        found = read_certificate(held.get(CERT, ""), held.get(KEY, ""), held.get(CA, ""))
        return found if found is not None and self._clock.now() < found.not_after_s else None

    async def entry(self, namespace: str, name: str, entry: str) -> str:
        return (await self._get(namespace, name) or {}).get(entry, "")

    async def _has(self, namespace: str, name: str, entry: str) -> bool:
        try:
            snapshot = await self._get(namespace, name)
        except Forbidden:  # it may exist; otherwise the pods report it
            return True
        return snapshot is not None and (not entry or entry in snapshot)

    async def _wrong_pairs(self, namespace: str, owner: AdaptiveSpeculator) -> list[MissingSecret]:
        """The Secret of the clients' port, if it has all entries and servers could not use it."""
        reference = owner.spec.serving.tls_secret_ref
        try:
            held = await self._get(namespace, reference.name) if reference is not None else None
        except Forbidden:
            return []
        if reference is None or held is None or not {CERT, KEY} <= held.keys():
            return []
        certificate = read_certificate(held[CERT], held[KEY], "")
        if certificate is None:
            return [MissingSecret(reference.name, f"{CERT} and {KEY} are not a PEM certificate and its own key")]
        is_over = self._clock.now() >= certificate.not_after_s
        return [MissingSecret(reference.name, "its certificate has expired")] if is_over else []

    async def _get(self, namespace: str, name: str) -> Mapping[str, str] | None:
        try:
            secret = await self._cluster.get("Secret", namespace, name)
        except NotFound:
            return None
        return {
            entry: base64.b64decode(value).decode(errors="replace")
            for entry, value in (secret.get("data") or {}).items()
        }


def _is_due(snapshot: SecretsSnapshot, parts: Collection[str], now_s: float) -> bool:
    """Whether Secrets are read again before they expire, because something is about to make one."""
    is_missed = bool(snapshot.missing) and now_s - snapshot.at_s >= FRESH_S
    return is_missed or not snapshot.certificates.keys() >= set(parts)


async def redis_key(cluster: Cluster, namespace: str, name: str, *, may_write: bool) -> bytes:
    """The key in the operator's own Secret, which the chart makes empty, and the operator fills. NotFound if it may not."""
    try:
        held = await cluster.get("Secret", namespace, name)
    except NotFound:
        held = {}
    if not held.get("data"):
        if not may_write:
            raise NotFound(f"Secret {namespace}/{name} has no key yet")
        try:
            held = await _filled(cluster, namespace, name, held)
        except Conflict:  # another replica was faster
            held = await cluster.get("Secret", namespace, name)
    key = base64.b64decode((held.get("data") or {}).get(_KEY, ""))
    if len(key) < _PASSWORD_BYTES:
        raise InvalidInput(f"Secret {namespace}/{name} needs an entry {_KEY} of at least {_PASSWORD_BYTES} bytes")
    return key


async def _filled(cluster: Cluster, namespace: str, name: str, empty: Manifest) -> Manifest:
    """Conflict if somebody else wrote it since it was read."""
    version = {"resourceVersion": empty["metadata"]["resourceVersion"]} if empty else {}
    content: Manifest = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace, **version},
        "data": {_KEY: base64.b64encode(secrets.token_bytes(_PASSWORD_BYTES)).decode()},
    }
    return await (cluster.apply(content) if empty else cluster.create(content))


def _wanted(owner: AdaptiveSpeculator) -> frozenset[Place]:
    """The Redis of the operator that the spec wants, whether the operator has it or not."""
    redis = owner.spec.traces.redis or Redis()
    if not owner.spec.traces.enabled or redis.url_secret_ref is not None:
        return frozenset()
    return frozenset({Place.DEDICATED if redis.mode is RedisMode.DEDICATED else Place.SHARED})


def named(owner: AdaptiveSpeculator) -> Iterator[tuple[str, str]]:
    """Secrets that a spec names, each with the required entry; empty: any entry."""
    spec = owner.spec
    if spec.target_model.secret_ref is not None:
        yield spec.target_model.secret_ref.name, ""
    if spec.serving.api_keys_secret_ref is not None:
        yield spec.serving.api_keys_secret_ref.name, spec.serving.api_keys_secret_ref.key
    if spec.serving.tls_secret_ref is not None:
        yield from ((spec.serving.tls_secret_ref.name, entry) for entry in (CERT, KEY))
    redis = dict.fromkeys(url_secret(owner, role) for role in Role)
    yield from ((secret.name, secret.key) for secret in redis if secret is not None)
    if spec.registry.bucket is not None and spec.registry.bucket.secret_ref is not None:
        yield spec.registry.bucket.secret_ref.name, ""


def fresh_passwords() -> dict[tuple[Place, Role], str]:
    """Each Redis gets passwords of its own, because those of a dedicated one can be learned in its namespace."""
    return {(place, role): secrets.token_hex(_PASSWORD_BYTES) for place in OURS for role in Role}
