"""Objects that belong to a speculator, as they were last observed: plain data that plans are made from.

Each object is kept as compressed JSON without the parts that nobody reads (managed fields, most of the status).
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from updraft_operator.api import names


class Key(NamedTuple):
    """A speculator."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Ref(NamedTuple):
    """An object of a speculator's namespace."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """An object that belongs to a speculator."""

    ref: Ref
    uid: str
    resource_version: str
    owner_uid: str
    """Of its controller; empty if it has none."""
    applied: str
    """The hash of what was applied last."""
    is_ending: bool
    status: Mapping[str, Any]
    """Only what is read of it."""
    is_scaled_by_others: bool
    """An autoscaler set its number of pods."""
    packed: bytes = field(repr=False)

    @classmethod
    def of(cls, kind: str, body: Mapping[str, Any]) -> "Child":
        """Take what is kept from an object."""
        metadata = body["metadata"]
        kept = {
            "metadata": {name: metadata.get(name) for name in ("labels", "annotations", "ownerReferences")},
            **{name: value for name, value in body.items() if name not in _NOT_KEPT},
        }
        return cls(
            ref=Ref(kind, metadata["name"]),
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            owner_uid=next((each["uid"] for each in metadata.get("ownerReferences", ()) if each.get("controller")), ""),
            applied=(metadata.get("annotations") or {}).get(names.APPLIED, ""),
            is_ending="deletionTimestamp" in metadata,
            status={name: body.get("status", {})[name] for name in _STATUS if name in body.get("status", {})},
            is_scaled_by_others=_is_scaled_by_others(metadata.get("managedFields", ())),
            packed=pack(kept),
        )

    def live(self) -> dict[str, Any]:
        """The object as it was seen last, without its status."""
        return unpack(self.packed)


_NOT_KEPT = {"metadata", "status", "apiVersion", "kind"}
_STATUS = (
    "replicas",
    "readyReplicas",
    "updatedReplicas",
    "observedGeneration",
    "conditions",
    "succeeded",
    "failed",
    "phase",
)
_AUTOSCALERS = ("kube-controller-manager", "horizontal-pod-autoscaler", "vpa", "keda")


def _is_scaled_by_others(fields: Iterable[Mapping[str, Any]]) -> bool:
    """Whether replicas were last set through the scale subresource by a controller; a person who scales is undone."""
    return any(
        entry.get("subresource") == "scale" and str(entry.get("manager", "")).startswith(_AUTOSCALERS)
        for entry in fields
    )


def pack(content: Mapping[str, Any]) -> bytes:
    """Compressed JSON."""
    return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), level=1)


def unpack(packed: bytes) -> dict[str, Any]:
    """What was packed."""
    content: dict[str, Any] = json.loads(zlib.decompress(packed))
    return content
