"""Objects that belong to a speculator, as they were last observed: plain data that plans are made from.

Each object is kept as compressed JSON without the parts that nobody reads (managed fields, most of the status).
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from updraft_operator.api import names


class Key(NamedTuple):
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Ref(NamedTuple):
    kind: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    ref: Ref
    uid: str
    resource_version: str
    owner_uid: str
    """UID of its controller; empty if it has none."""
    generation: int
    """Grows with every change of the spec; 0 of kinds without one."""
    applied: str
    """Hash of the manifest that was last applied."""
    runtime: str
    """The runtime that made its pod template; empty of kinds without one."""
    rendered: str = field(repr=False)
    """See `planning.runtime.records`."""
    turn: str
    """The same."""
    is_ending: bool
    status: Mapping[str, Any]
    """Only the fields that are read."""
    is_scaled_by_others: bool
    """An autoscaler sets its replicas."""
    packed: bytes = field(repr=False)
    redis_secrets: tuple[str, ...] = ()
    """Names of the Secrets from which its containers get the address of a Redis; empty if not from a Secret."""

    @classmethod
    def of(cls, kind: str, body: Mapping[str, Any]) -> "Child":
        metadata = body["metadata"]
        annotations = dict(metadata.get("annotations") or {})
        rendered = annotations.pop(names.RENDERED, "")
        identity = {name: metadata.get(name) for name in ("labels", "ownerReferences")}
        kept = {
            "metadata": {**identity, "annotations": annotations},
            **{name: value for name, value in body.items() if name not in _NOT_KEPT},
        }
        return cls(
            ref=Ref(kind, metadata["name"]),
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            owner_uid=next(
                (owner["uid"] for owner in metadata.get("ownerReferences", ()) if owner.get("controller")), ""
            ),
            generation=metadata.get("generation", 0),
            applied=annotations.get(names.APPLIED, ""),
            runtime=annotations.get(names.RUNTIME, ""),
            rendered=rendered,
            turn=annotations.get(names.TURN, ""),
            is_ending="deletionTimestamp" in metadata,
            status={name: body.get("status", {})[name] for name in _STATUS if name in body.get("status", {})},
            is_scaled_by_others=_is_scaled_by_others(metadata.get("managedFields", ())),
            packed=pack(kept),
            redis_secrets=tuple(redis_secrets(body.get("spec", {}))) if kind in _WORKLOADS else (),
        )

    def live(self) -> dict[str, Any]:
        """The object as last observed, without its status."""
        return unpack(self.packed)


_WORKLOADS = ("Deployment", "StatefulSet", "LeaderWorkerSet")
_REDIS_VARIABLE = "_REDIS_URL"
_NOT_KEPT = {"metadata", "status", "apiVersion", "kind"}
_STATUS = ("replicas", "readyReplicas", "updatedReplicas", "updateRevision", "observedGeneration", "conditions")
_AUTOSCALERS = ("kube-controller-manager", "horizontal-pod-autoscaler", "vpa", "keda")


def _is_scaled_by_others(fields: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a controller last set replicas through the scale subresource; manual scaling is reverted."""
    return any(
        entry.get("subresource") == "scale" and str(entry.get("manager", "")).startswith(_AUTOSCALERS)
        for entry in fields
    )


def redis_secrets(content: Any) -> Iterator[str]:
    """Names of the Secrets from which the containers in a part of an object get the address of a Redis."""
    if isinstance(content, list):
        for each in content:
            yield from redis_secrets(each)
    elif isinstance(content, dict):
        if str(content.get("name", "")).endswith(_REDIS_VARIABLE):
            yield (content.get("valueFrom") or {}).get("secretKeyRef", {}).get("name", "")
        for each in content.values():
            yield from redis_secrets(each)


def pack(content: Mapping[str, Any]) -> bytes:
    return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), level=1)


def unpack(packed: bytes) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(zlib.decompress(packed))
    return content
