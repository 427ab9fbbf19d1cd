"""What every manifest has: who it is, whose it is, and the marks by which it is found and compared."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Which image runs what, unless the spec says otherwise."""

    inference: str
    trainer: str
    registry: str
    operator: str
    """Also downloads models, and imports drafts."""
    sglang: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorConfig:
    """What a build takes from the operator rather than from the spec."""

    images: Images
    namespace: str
    """The operator's own, whose pods may call registries."""
    has_redis: bool
    """There is a Redis for speculators that name none."""
    redis_mark: str = ""
    """Another one for another address of that Redis: it restarts the pods that read it; empty where none do."""


def manifest(owner: AdaptiveSpeculator, api_version: str, kind: str, name: str, part: str, **content: Any) -> Manifest:
    """An object of a part of `owner`; `content` is the rest of it."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": owner.metadata.namespace,
            "labels": names.labels(owner.metadata.name, part),
            "ownerReferences": [owner_reference(owner)],
        },
        **content,
    }


def owner_reference(owner: AdaptiveSpeculator) -> dict[str, Any]:
    """With it the object goes when the resource goes, and nobody else's controller takes it."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": "AdaptiveSpeculator",
        "name": owner.metadata.name,
        "uid": owner.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def digest(content: Mapping[str, Any]) -> str:
    """A short hash of a manifest or a part of one."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def marked(content: Manifest) -> Manifest:
    """The manifest with the hash of itself as an annotation."""
    metadata = content["metadata"]
    annotations = {**metadata.get("annotations", {}), names.APPLIED: digest(content)}
    return {**content, "metadata": {**metadata, "annotations": annotations}}
