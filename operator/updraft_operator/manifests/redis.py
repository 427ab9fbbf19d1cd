"""Where traces go: a Redis that the spec names, or the operator's own, with a user for each role."""

from typing import Any

from kubernetes.utils.quantity import parse_quantity

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, SecretKey
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, manifest
from updraft_operator.manifests.pod import secret_variable
from updraft_operator.manifests.redis_users import Role

_MIB = 1024 * 1024
_UNIT_S = {"m": 60, "h": 3600, "d": 86_400}

URL = "url"
"""Entry with the address in the Secret of a role."""

_PARTS = {Role.WRITER: names.SERVING, Role.READER: names.TRAINER}


def secret_name(speculator: str, role: Role) -> str:
    return names.child(speculator, f"redis-{role}")


def secret(owner: AdaptiveSpeculator, role: Role, url: str) -> Manifest:
    """The Secret with the address of the operator's Redis for one role, with the password of its user only."""
    name = secret_name(owner.metadata.name, role)
    return manifest(owner, "v1", "Secret", name, _PARTS[role], type="Opaque", stringData={URL: url})


def has_redis(owner: AdaptiveSpeculator, config: OperatorConfig) -> bool:
    return owner.spec.traces.enabled and (owner.spec.traces.redis is not None or config.has_redis)


def uses_operators(owner: AdaptiveSpeculator, config: OperatorConfig) -> bool:
    """Whether its traces go through the operator's Redis."""
    return has_redis(owner, config) and owner.spec.traces.redis is None


def stream_namespace(owner: AdaptiveSpeculator, config: OperatorConfig) -> str:
    """The namespace of the stream keys: no two installations have the same, even if they share a Redis."""
    return f"{config.installation}:{owner.metadata.namespace}"


def redis_marks(owner: AdaptiveSpeculator, role: Role, config: OperatorConfig) -> dict[str, str]:
    """Hash of the address, for the settings of pods that read it from the operator's Secret."""
    return {URL: config.redis_marks[role]} if uses_operators(owner, config) and role in config.redis_marks else {}


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
    if not has_redis(owner, config):
        return []
    own = url_secret(owner, role)
    if own is not None:
        return [secret_variable(variable, own.name, own.key)]
    return [secret_variable(variable, secret_name(owner.metadata.name, role), URL)]


def url_secret(owner: AdaptiveSpeculator, role: Role) -> SecretKey | None:
    """The Secret that the spec names for a role; None if it names no Redis."""
    redis = owner.spec.traces.redis
    if redis is None:
        return None
    return (redis.reader_url_secret_ref if role is Role.READER else None) or redis.url_secret_ref
