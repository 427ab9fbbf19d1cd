"""The cache of watched objects, by speculator: compressed, so that thousands of resources fit.

Refused: kopf's own indexes, which keep an object that was deleted while its watch was interrupted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from updraft_chassis.errors import InvalidInput
from updraft_operator.api import names
from updraft_operator.api.draft_import import DraftImport
from updraft_operator.api.draft_version import DraftVersion
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.planning.objects import Child, Key, Ref, pack, unpack
from updraft_operator.planning.pods import PodState
from updraft_operator.watching.cluster import OURS

M = TypeVar("M", bound=BaseModel)

_MAX_GONE = 4096
"""Deletions that are remembered: far more than can happen while an answer is in transit."""


class Unreadable(InvalidInput):
    """An object that a newer CRD admits and this operator cannot read."""

    def __init__(self, problem: str, ref: Ref) -> None:
        super().__init__(problem)
        self.ref = ref


@dataclass(frozen=True, slots=True)
class _CachedObject:
    version: str
    content: Child | PodState | bytes
    """Packed for our own kinds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedObjects:
    speculator: AdaptiveSpeculator | None
    children: Mapping[Ref, Child]
    pods: tuple[PodState, ...]
    drafts: tuple[DraftVersion, ...]
    imports: tuple[DraftImport, ...]


class Store:
    """Filled by the watches, read by reconciliations. Not thread-safe.

    Events older than the cached object are ignored: the deletion of an object and the creation of another with the same
    name may arrive in either order, and the answer to one of our writes after both.
    """

    def __init__(self) -> None:
        self._objects: dict[Key, dict[Ref, _CachedObject]] = {}
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
        objects, ref = self._objects.setdefault(key, {}), Ref(kind, name)
        if ref in objects and is_older(version, objects[ref].version):
            return key
        objects[ref] = _CachedObject(version, _content(kind, body))
        return key

    def tells_nothing(self, kind: str, body: Mapping[str, Any]) -> bool:
        """Whether exactly this version of an object is cached, because it was the answer to one of our writes."""
        key = key_of(kind, body)
        known = self._objects.get(key, {}).get(Ref(kind, body["metadata"]["name"])) if key is not None else None
        return known is not None and known.version == body["metadata"]["resourceVersion"]

    def tells_only_status(self, kind: str, body: Mapping[str, Any]) -> bool:
        """Whether an object of ours differs from the cached one in its status alone, from which no plan follows."""
        key = key_of(kind, body) if kind in OURS else None
        known = self._objects.get(key, {}).get(Ref(kind, body["metadata"]["name"])) if key is not None else None
        if known is None or not isinstance(known.content, bytes):
            return False
        return _without_status(kind, unpack(known.content)) == _without_status(kind, _lean(body))

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
        objects, ref = self._objects.get(key, {}), Ref(kind, name)
        if ref not in objects or is_older(version, objects[ref].version):
            return
        del objects[ref]
        if not objects:
            del self._objects[key]

    def cached(self, key: Key) -> CachedObjects:
        """The objects of a key. Raises Unreadable."""
        contents = {ref: cached.content for ref, cached in self._objects.get(key, {}).items()}
        packed = contents.get(_speculator(key))
        by_kind = {
            kind: [content for ref, content in contents.items() if ref.kind == kind and isinstance(content, bytes)]
            for kind in ("DraftVersion", "DraftImport")
        }
        return CachedObjects(
            speculator=_read(AdaptiveSpeculator, packed) if isinstance(packed, bytes) else None,
            children={ref: content for ref, content in contents.items() if isinstance(content, Child)},
            pods=tuple(content for content in contents.values() if isinstance(content, PodState)),
            drafts=tuple(_read(DraftVersion, content) for content in by_kind["DraftVersion"]),
            imports=tuple(_read(DraftImport, content) for content in by_kind["DraftImport"]),
        )

    def content(self, key: Key, ref: Ref) -> dict[str, Any]:
        """Metadata, spec and status of a cached object of our own API, unread."""
        packed = self._objects[key][ref].content
        assert isinstance(packed, bytes)
        return unpack(packed)

    def all_keys(self) -> list[Key]:
        return sorted(self._objects)

    def speculators(self) -> list[Key]:
        """Those that exist. The server of metrics calls it in a thread of its own.

        No other thread runs while `list` copies keys. While it copies pairs, one may: each pair is a new object, so Python may
        collect garbage in between.
        """
        return [key for key in list(self._objects) if self.has(key)]

    def has(self, key: Key) -> bool:
        """Whether the speculator exists."""
        return _speculator(key) in self._objects.get(key, ())

    def versions(self, kind: str) -> dict[tuple[str, str], str]:
        """Resource versions of all objects of a kind, by namespace and name."""
        return {
            (key.namespace, ref.name): cached.version
            for key, objects in self._objects.items()
            for ref, cached in objects.items()
            if ref.kind == kind
        }

    def owner(self, kind: str, namespace: str, name: str) -> Key | None:
        ref = Ref(kind, name)
        return next(
            (key for key, cached in self._objects.items() if key.namespace == namespace and ref in cached), None
        )


def _content(kind: str, body: Mapping[str, Any]) -> Child | PodState | bytes:
    if kind in OURS:
        return pack(_lean(body))
    return PodState.of(body) if kind == "Pod" else Child.of(kind, body)


def _without_status(kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The part that plans follow from. The status of a DraftImport is: it tells that the import is done."""
    status = content["status"] if kind == "DraftImport" else {}
    metadata = {name: value for name, value in content["metadata"].items() if name != "resourceVersion"}
    return {"metadata": metadata, "spec": content["spec"], "status": status}


def _speculator(key: Key) -> Ref:
    return Ref("AdaptiveSpeculator", key.name)


def _read(model: type[M], packed: bytes) -> M:
    """Raises Unreadable."""
    content = unpack(packed)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where, name = ".".join(map(str, first["loc"])), content["metadata"]["name"]
        problem = f"{model.__name__} {name} cannot be read: {where}: {first['msg']}"
        raise Unreadable(problem, Ref(model.__name__, name)) from error


def is_older(version: str, known: str) -> bool:
    """Whether a resource version precedes another. Versions of one cluster grow (KEP-5504); others are not compared."""
    return version.isdigit() and known.isdigit() and int(version) < int(known)


def key_of(kind: str, body: Mapping[str, Any]) -> Key | None:
    """The speculator that an object belongs to: by its own name, its speculatorRef, or its label."""
    metadata = body["metadata"]
    if kind == "AdaptiveSpeculator":
        name = metadata["name"]
    elif kind in OURS:
        name = body.get("spec", {}).get("speculatorRef", {}).get("name", "")
    else:
        name = (metadata.get("labels") or {}).get(names.SPECULATOR, "")
    return Key(metadata.get("namespace", ""), name) if name else None


def _lean(body: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {name: value for name, value in body["metadata"].items() if name not in ("managedFields", "annotations")}
    given = body["metadata"].get("annotations") or {}
    if requests := {name: given[name][:65] for name in names.REQUESTS if given.get(name)}:  # more than one may have
        metadata["annotations"] = requests
    return {"metadata": metadata, "spec": body.get("spec", {}), "status": body.get("status", {})}
