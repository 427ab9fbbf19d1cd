"""Where traces go: the operator's Redis, one of the speculator's own, or one that the spec names.

In the first two each role has a user of its own, and a Secret with its address. The Secrets of both have different names, so
that a pod template shows where its pods send or read traces.
"""

from enum import StrEnum
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, RedisMode, SecretKey
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, manifest
from updraft_operator.manifests.pod import secret_variable
from updraft_operator.manifests.redis_users import Role

_MIB = 1024 * 1024
_UNIT_S = {"m": 60, "h": 3600, "d": 86_400}

URL = "url"
"""Entry with the address in the Secret of a role."""

ROTATION = "rotation"
"""Entry with the request that its password was made for, if there was one."""

_PARTS = {Role.WRITER: names.SERVING, Role.READER: names.TRAINER}


class Place(StrEnum):
    """Where the traces of a speculator wait."""

    SHARED = "redis"
    """The operator's Redis."""
    DEDICATED = "dedicated"
    """A Redis that the operator runs for this speculator alone."""
    NAMED = "named"
    """One that the spec names."""


OURS = (Place.SHARED, Place.DEDICATED)
"""Those whose users the operator makes."""


def secret_name(speculator: str, role: Role, place: Place = Place.SHARED) -> str:
    """The Secret of a role, for one of `OURS`."""
    return names.child(speculator, f"{place}-{role}")


def secret(owner: AdaptiveSpeculator, role: Role, place: Place, url: str, rotation: str = "") -> Manifest:
    """The Secret with the address of this Redis for one role, with the password of its user only, and the request that it was
    made for."""
    content = {URL: url} | ({ROTATION: rotation} if rotation else {})
    name = secret_name(owner.metadata.name, role, place)
    return manifest(owner, "v1", "Secret", name, _PARTS[role], type="Opaque", stringData=content)


def wanted_place(owner: AdaptiveSpeculator, config: OperatorConfig) -> Place | None:
    """Where the spec wants its traces; None if nowhere, or if the operator has no such Redis."""
    redis = owner.spec.traces.redis
    if not owner.spec.traces.enabled:
        return None
    if redis is not None and redis.url_secret_ref is not None:
        return Place.NAMED
    if redis is not None and redis.mode is RedisMode.DEDICATED:
        return Place.DEDICATED if config.has_dedicated_redis else None
    return Place.SHARED if config.has_redis else None


def place_of(owner: AdaptiveSpeculator, role: Role, config: OperatorConfig) -> Place | None:
    """Where the pods of a role are pointed: during a move not all of them where the spec wants it."""
    wanted = wanted_place(owner, config)
    return None if wanted is None else Place(config.redis_places.get(role, wanted))


def has_redis(owner: AdaptiveSpeculator, config: OperatorConfig) -> bool:
    return wanted_place(owner, config) is not None


def stream_namespace(owner: AdaptiveSpeculator, config: OperatorConfig) -> str:
    """The namespace of the stream keys: no two installations have the same, even if they share a Redis."""
    return f"{config.installation}:{owner.metadata.namespace}"


def redis_marks(owner: AdaptiveSpeculator, role: Role, config: OperatorConfig) -> dict[str, str]:
    """Hash of the address, for the settings of pods that read it from the operator's Secret."""
    is_ours = place_of(owner, role, config) in OURS
    return {URL: config.redis_marks[role]} if is_ours and role in config.redis_marks else {}


def stream_size(owner: AdaptiveSpeculator, prefix: str) -> dict[str, str]:
    """The setting for the size of the streams that the spec chooses, of a process with this prefix."""
    if owner.spec.traces.max_size is None:
        return {}
    num_bytes = max(1, int(parse_quantity(owner.spec.traces.max_size)) // _MIB) * _MIB
    return {f"{prefix}_CAPTURE_MAX_BYTES": str(num_bytes)}


def retention(owner: AdaptiveSpeculator, variable: str) -> dict[str, str]:
    """The setting for the age at which traces are deleted."""
    age = owner.spec.traces.retention
    return {} if age is None else {variable: str(int(age[:-1]) * _UNIT_S[age[-1]])}


def redis_variables(
    owner: AdaptiveSpeculator, role: Role, variable: str, config: OperatorConfig
) -> list[dict[str, Any]]:
    """The variable with the address, from a Secret because it contains a password; none without Redis."""
    place, own = place_of(owner, role, config), url_secret(owner, role)
    if place is None:
        return []
    if place is Place.NAMED and own is not None:
        return [secret_variable(variable, own.name, own.key)]
    return [secret_variable(variable, secret_name(owner.metadata.name, role, place), URL)]


def url_secret(owner: AdaptiveSpeculator, role: Role) -> SecretKey | None:
    """The Secret that the spec names for a role; None if it names no Redis."""
    redis = owner.spec.traces.redis
    if redis is None:
        return None
    return (redis.reader_url_secret_ref if role is Role.READER else None) or redis.url_secret_ref
