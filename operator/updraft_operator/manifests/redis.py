"""Where traces go: a Redis that the spec names, or the operator's own."""

import hashlib
import hmac
from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.manifests.pod import secret_variable

KEY = "redis-url"
"""Of the operator's Redis, in the Secret of a speculator."""


def has_redis(owner: AdaptiveSpeculator, config: OperatorConfig) -> bool:
    """Whether traces can go anywhere."""
    return owner.spec.traces.enabled and (owner.spec.traces.redis is not None or config.has_redis)


def mark(url: str, key: str) -> str:
    """A hash that says whether the address is still the same, and nothing else.

    The address has a password in it, and who may read a pod template may not read Secrets. A plain hash, or one with a
    salt that is known, lets a weak password be guessed and tried at leisure; this one is keyed with a random token.
    """
    return hmac.new(key.encode(), url.encode(), hashlib.sha256).hexdigest()


def redis_marks(owner: AdaptiveSpeculator, config: OperatorConfig) -> dict[str, str]:
    """What the settings of a pod that reads the operator's Redis are hashed with."""
    reads_it = has_redis(owner, config) and owner.spec.traces.redis is None
    return {KEY: config.redis_mark} if reads_it and config.redis_mark else {}


def redis_variables(owner: AdaptiveSpeculator, variable: str, config: OperatorConfig) -> list[dict[str, Any]]:
    """The variable with the address, which has a password in it; none where no traces go."""
    if not has_redis(owner, config):
        return []
    if owner.spec.traces.redis is not None:
        secret = owner.spec.traces.redis.url_secret_ref
        return [secret_variable(variable, secret.name, secret.key)]
    return [secret_variable(variable, names.child(owner.metadata.name, "access"), KEY)]
