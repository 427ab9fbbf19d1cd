"""Where traces go: a Redis that the spec names, or the operator's own."""

import hashlib
import hmac
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, manifest
from updraft_operator.manifests.pod import secret_variable

_MIB = 1024 * 1024

KEY = "redis-url"
"""Entry with the address of the operator's Redis in a speculator's Secret."""

MARK_KEY = "mark-key"
"""Entry with a random key, for `mark`."""


def access(owner: AdaptiveSpeculator, redis_url: str, mark_key: str) -> Manifest:
    """The Secret with the address of the operator's Redis."""
    # Even if empty: an omitted entry of stringData stays in the Secret.
    content = {KEY: redis_url, MARK_KEY: mark_key}
    name = names.child(owner.metadata.name, "access")
    return manifest(owner, "v1", "Secret", name, names.TRAINER, type="Opaque", stringData=content)


def has_redis(owner: AdaptiveSpeculator, config: OperatorConfig) -> bool:
    return owner.spec.traces.enabled and (owner.spec.traces.redis is not None or config.has_redis)


def mark(url: str, key: str) -> str:
    """A hash that reveals only whether the address changed.

    The address contains a password, and readers of a pod template may not be allowed to read Secrets. A plain hash, or one
    with a known salt, would allow guessing a weak password offline; this one is keyed with a random key.
    """
    return hmac.new(key.encode(), url.encode(), hashlib.sha256).hexdigest()


def redis_marks(owner: AdaptiveSpeculator, config: OperatorConfig) -> dict[str, str]:
    """Hash of the Redis address for the settings of pods that read the operator's Redis."""
    reads_it = has_redis(owner, config) and owner.spec.traces.redis is None
    return {KEY: config.redis_mark} if reads_it and config.redis_mark else {}


def stream_size(owner: AdaptiveSpeculator, prefix: str) -> dict[str, str]:
    """The setting for the size of the streams that the spec chooses, of a process with this prefix."""
    if owner.spec.traces.max_size is None:
        return {}
    num_bytes = max(1, int(parse_quantity(owner.spec.traces.max_size)) // _MIB) * _MIB
    return {f"{prefix}_CAPTURE_MAX_BYTES": str(num_bytes)}


def redis_variables(owner: AdaptiveSpeculator, variable: str, config: OperatorConfig) -> list[dict[str, Any]]:
    """The variable with the address, from a Secret because it contains a password; none without Redis."""
    if not has_redis(owner, config):
        return []
    if owner.spec.traces.redis is not None:
        secret = owner.spec.traces.redis.url_secret_ref
        return [secret_variable(variable, secret.name, secret.key)]
    return [secret_variable(variable, names.child(owner.metadata.name, "access"), KEY)]
