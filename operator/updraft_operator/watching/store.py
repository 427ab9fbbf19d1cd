"""The cache of watched objects, by speculator: compressed, so that thousands of resources fit.

Refused: kopf's own indexes, which keep an object that was deleted while its watch was interrupted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from updraft_chassis.errors import InvalidInput
from updraft_operator.api import names
from updraft_operator.api.draft_version import DraftVersion
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.planning.objects import Child, Key, Ref, pack, unpack
from updraft_operator.planning.pods import PodState

M = TypeVar("M", bound=BaseModel)


_MAX_GONE = 4096
"""Deletions that are remembered: far more than can happen while an answer is in transit."""


@dataclass(slots=True)
class _Entry:
    speculator: bytes = b""
    version: str = ""
    children: dict[Ref, Child] = field(default_factory=dict)
    pods: dict[str, tuple[str, PodState]] = field(default_factory=dict)
    drafts: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def version_of(self, kind: str, name: str) -> str:
        if kind == "AdaptiveSpeculator":
            return self.version
        if kind == "DraftVersion":
            return self.drafts.get(name, ("", b""))[0]
        if kind == "Pod":
            return self.pods[name][0] if name in self.pods else ""
        child = self.children.get(Ref(kind, name))
        return child.resource_version if child else ""

    @property
    def is_empty(self) -> bool:
        return not (self.speculator or self.children or self.pods or self.drafts)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedObjects:
    speculator: AdaptiveSpeculator | None
    children: Mapping[Ref, Child]
    pods: tuple[PodState, ...]
    drafts: tuple[DraftVersion, ...]


class Store:
    """Filled by the watches, read by reconciliations. Not thread-safe.

    Events older than the cached object are ignored: the deletion of an object and the creation of another with the same
    name may arrive in either order, and the answer to one of our writes after both.
    """

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}
        self._gone: dict[tuple[str, str, str], str] = {}
        """Resource versions at which objects were recently deleted."""

    def put(self, kind: str, body: Mapping[str, Any]) -> Key | None:
        """Cache an object. Returns the speculator that it belongs to (or did until now), or None."""
        key = key_of(kind, body)
        if key is None:
            return self._drop_unowned(kind, body["metadata"])
        name, version = body["metadata"]["name"], body["metadata"]["resourceVersion"]
        if is_older(version, self._gone.get((kind, key.namespace, name), "")):
            return key
        entry = self._entries.setdefault(key, _Entry())
        if is_older(version, entry.version_of(kind, name)):
            return key
        if kind == "AdaptiveSpeculator":
            entry.speculator, entry.version = pack(_lean(body)), version
        elif kind == "DraftVersion":
            entry.drafts[name] = (version, pack(_lean(body)))
        elif kind == "Pod":
            entry.pods[name] = (version, PodState.of(body))
        else:
            entry.children[Ref(kind, name)] = Child.of(kind, body)
        return key

    def _drop_unowned(self, kind: str, metadata: Mapping[str, Any]) -> Key | None:
        """Drop an object whose owner label was removed. Returns its former owner."""
        key = self.owner(kind, metadata.get("namespace", ""), metadata["name"])
        if key is not None:
            self.drop(kind, key, metadata["name"], metadata["resourceVersion"])
        return key

    def drop(self, kind: str, key: Key, name: str, version: str = "") -> None:
        """Remove an object, unless a newer one than `version` is cached."""
        if version:
            self._gone[kind, key.namespace, name] = version
            if len(self._gone) > _MAX_GONE:
                del self._gone[next(iter(self._gone))]
        entry = self._entries.get(key)
        if entry is None or is_older(version, entry.version_of(kind, name)):
            return
        if kind == "AdaptiveSpeculator":
            entry.speculator, entry.version = b"", ""
        elif kind == "DraftVersion":
            entry.drafts.pop(name, None)
        elif kind == "Pod":
            entry.pods.pop(name, None)
        else:
            entry.children.pop(Ref(kind, name), None)
        if entry.is_empty:
            del self._entries[key]

    def cached(self, key: Key) -> CachedObjects:
        """The objects of a key. InvalidInput for an object that a newer CRD admits and this operator cannot read."""
        entry = self._entries.get(key, _Entry())
        speculator = _read(AdaptiveSpeculator, entry.speculator) if entry.speculator else None
        return CachedObjects(
            speculator=speculator,
            children=dict(entry.children),
            pods=tuple(state for _, state in entry.pods.values()),
            drafts=tuple(_read(DraftVersion, packed) for _, packed in entry.drafts.values()),
        )

    def all_keys(self) -> list[Key]:
        return sorted(self._entries)

    def speculators(self) -> list[Key]:
        return [key for key, entry in self._entries.items() if entry.speculator]

    def versions(self, kind: str) -> dict[tuple[str, str], str]:
        """Resource versions of all objects of a kind, by namespace and name."""
        return {(key.namespace, name): version for key, name, version in self._of_kind(kind)}

    def owner(self, kind: str, namespace: str, name: str) -> Key | None:
        return next(
            (key for key, candidate, _ in self._of_kind(kind) if (key.namespace, candidate) == (namespace, name)), None
        )

    def _of_kind(self, kind: str) -> Iterator[tuple[Key, str, str]]:
        for key, entry in self._entries.items():
            if kind == "AdaptiveSpeculator":
                if entry.speculator:
                    yield key, key.name, entry.version
            elif kind in ("DraftVersion", "Pod"):
                versions = entry.drafts if kind == "DraftVersion" else entry.pods
                for name, (version, _) in versions.items():
                    yield key, name, version
            else:
                for ref, child in entry.children.items():
                    if ref.kind == kind:
                        yield key, ref.name, child.resource_version


def _read(model: type[M], packed: bytes) -> M:
    content = unpack(packed)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where, name = ".".join(map(str, first["loc"])), content["metadata"]["name"]
        raise InvalidInput(f"{model.__name__} {name} cannot be read: {where}: {first['msg']}") from error


def is_older(version: str, known: str) -> bool:
    """Whether a resource version precedes another. Versions of one cluster grow (KEP-5504); others are not compared."""
    return version.isdigit() and known.isdigit() and int(version) < int(known)


def key_of(kind: str, body: Mapping[str, Any]) -> Key | None:
    """The speculator that an object belongs to: by its own name, its speculatorRef, or its label."""
    metadata = body["metadata"]
    if kind == "AdaptiveSpeculator":
        name = metadata["name"]
    elif kind == "DraftVersion":
        name = body.get("spec", {}).get("speculatorRef", {}).get("name", "")
    else:
        name = (metadata.get("labels") or {}).get(names.SPECULATOR, "")
    return Key(metadata.get("namespace", ""), name) if name else None


def _lean(body: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {name: value for name, value in body["metadata"].items() if name not in ("managedFields", "annotations")}
    return {"metadata": metadata, "spec": body.get("spec", {}), "status": body.get("status", {})}
