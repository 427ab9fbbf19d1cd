"""What the watches said last, by speculator: small, so that thousands of resources fit.

Objects are kept as compressed JSON without what nobody reads (managed fields, the status of most). Everything is
plain data; who changes it says whose state is now another one. Refused: kopf's own indexes, from which an object does
not vanish that was deleted while its watch was broken.
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
"""Deletions that are remembered: far more than happen while an answer is on its way."""


@dataclass(slots=True)
class _Entry:
    """All that is known around one key."""

    speculator: bytes = b""
    version: str = ""
    children: dict[Ref, Child] = field(default_factory=dict)
    pods: dict[str, tuple[str, PodState]] = field(default_factory=dict)
    drafts: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def version_of(self, kind: str, name: str) -> str:
        """Resource version of an object; empty: none is known."""
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
class Known:
    """What is known around one key."""

    speculator: AdaptiveSpeculator | None
    children: Mapping[Ref, Child]
    pods: tuple[PodState, ...]
    drafts: tuple[DraftVersion, ...]


class Store:
    """Filled by the watches, read by reconciliations. Not for threads.

    What is older than what is known is not believed: news of a deletion and of a new object of the same name may come
    in either order, and the answer to a write of ours after both.
    """

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}
        self._gone: dict[tuple[str, str, str], str] = {}
        """Resource versions at which objects were deleted lately."""

    def put(self, kind: str, body: Mapping[str, Any]) -> Key | None:
        """Remember an object as it is now; whose it is (or was until now), or None for nobody's."""
        key = key_of(kind, body)
        if key is None:
            return self._lost(kind, body["metadata"])
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

    def _lost(self, kind: str, metadata: Mapping[str, Any]) -> Key | None:
        """An object that is nobody's: if somebody took its label away, it is missed where it belongs."""
        key = self.owner(kind, metadata.get("namespace", ""), metadata["name"])
        if key is not None:
            self.drop(kind, key, metadata["name"], metadata["resourceVersion"])
        return key

    def drop(self, kind: str, key: Key, name: str, version: str = "") -> None:
        """Forget an object, unless a newer one than `version` is known."""
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

    def known(self, key: Key) -> Known:
        """What is known around a key. InvalidInput for what a newer definition lets in and this operator cannot read."""
        entry = self._entries.get(key, _Entry())
        found = _read(AdaptiveSpeculator, entry.speculator) if entry.speculator else None
        return Known(
            speculator=found,
            children=dict(entry.children),
            pods=tuple(state for _, state in entry.pods.values()),
            drafts=tuple(_read(DraftVersion, packed) for _, packed in entry.drafts.values()),
        )

    def all_keys(self) -> list[Key]:
        """All keys that anything is known around."""
        return sorted(self._entries)

    def speculators(self) -> list[Key]:
        """Keys whose resource exists."""
        return [key for key, entry in self._entries.items() if entry.speculator]

    def versions(self, kind: str) -> dict[tuple[str, str], str]:
        """Resource versions of all objects of a kind, by namespace and name."""
        return {(key.namespace, name): version for key, name, version in self._of_kind(kind)}

    def owner(self, kind: str, namespace: str, name: str) -> Key | None:
        """Whose an object is that is known."""
        return next((key for key, each, _ in self._of_kind(kind) if (key.namespace, each) == (namespace, name)), None)

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
    """Whether a resource version is of the past; those of one cluster grow (KEP-5504), others cannot be compared."""
    return version.isdigit() and known.isdigit() and int(version) < int(known)


def key_of(kind: str, body: Mapping[str, Any]) -> Key | None:
    """Whose an object is: by its name, by the speculator that it names, or by its label."""
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
