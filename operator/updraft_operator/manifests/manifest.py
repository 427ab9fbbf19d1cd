"""The common parts of all manifests: identity, owner, labels, and the hash that they are compared by."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, Metadata
from updraft_operator.manifests.redis_users import Role
from updraft_operator.manifests.tls.terms import Tls

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Default images, which a spec can override."""

    inference: str
    trainer: str
    registry: str
    operator: str
    """Also downloads models and imports drafts."""
    sglang: str
    vllm: str
    redis: str = "redis:8.2-bookworm"
    """For dedicated Redis: with sh, redis-server and redis-cli."""
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    has_fixed_user: bool = True
    """Whether pods name the images' user. OpenShift chooses a user for each namespace and refuses pods that name another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorConfig:
    """The operator's settings that manifests depend on."""

    images: Images
    namespace: str
    """The operator's own namespace, whose operator pods may call registries."""
    account: str = "updraft-operator"
    """The operator's own ServiceAccount, in its namespace."""
    has_redis: bool
    """Whether there is a Redis for speculators that name none."""
    has_dedicated_redis: bool = False
    """Whether speculators may have a Redis of their own."""
    has_leader_worker_sets: bool = False
    """Whether the cluster serves LeaderWorkerSets."""
    issuer: str = "https://kubernetes.default.svc.cluster.local"
    """Issuer of the cluster's ServiceAccount tokens. The default is that of most clusters, for plans without a cluster."""
    installation: str = "00000000-0000-0000-0000-000000000000"
    """UID of the operator's namespace, which no other cluster has. The default is for plans without a cluster."""
    runtime: str = "dev"
    """Names what this operator makes of a spec, for people: two operators may have the same name and differ."""
    max_upgrades: int = 1
    """Resources whose pods may restart for this operator at the same time."""
    upgrade_deadline_s: float = 2400.0
    """How long each of its pods may take to come back, unless its spec allows more."""
    tls: Tls = field(default_factory=Tls)
    metrics_from: tuple[Mapping[str, Any], ...] = ()
    """Peers of a NetworkPolicy that may scrape pods; none: everyone may."""
    redis_marks: Mapping[Role, str] = field(default_factory=dict)
    """Hashes of the addresses of a Redis of the operator, by role. A change restarts the pods of the role."""
    redis_places: Mapping[Role, str] = field(default_factory=dict)
    """Where the pods of a role are pointed (`redis.Place`), if not where the spec wants it."""


def manifest(owner: AdaptiveSpeculator, api_version: str, kind: str, name: str, part: str, **content: Any) -> Manifest:
    """An object of a part of `owner`; `content` holds its remaining fields."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": owner.metadata.namespace,
            "labels": names.labels(owner.metadata.name, part),
            "ownerReferences": [owner_reference("AdaptiveSpeculator", owner.metadata)],
        },
        **content,
    }


def owner_reference(kind: str, owner: Metadata) -> dict[str, Any]:
    """Makes Kubernetes delete the object with the resource, and keeps other controllers from adopting it."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": kind,
        "name": owner.name,
        "uid": owner.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def marked(content: Manifest) -> Manifest:
    metadata = content["metadata"]
    annotations = {**metadata.get("annotations", {}), names.APPLIED: digest(content)}
    return {**content, "metadata": {**metadata, "annotations": annotations}}
