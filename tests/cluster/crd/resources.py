"""The least resource of each kind, and what may be said more."""

from typing import Any

from tests.cluster.access import Api
from tests.cluster.crds import collection

from updraft_operator.api import names

Json = dict[str, Any]

DIGEST = f"sha256:{'0' * 64}"
SPECULATOR: Json = {"targetModel": {"uri": "hf://org/model"}}
ATTACHED: Json = {
    "engine": {"type": "VLLM"},
    "serving": {"mode": "Attached", "attached": {"selector": {"matchLabels": {"app": "vllm"}}}},
}
"""The fields of a resource for pods of another workload."""
DRAFT_VERSION: Json = {"speculatorRef": {"name": "chat"}, "source": "Trainer", "version": 1}
DRAFT_IMPORT: Json = {"speculatorRef": {"name": "chat"}, "uri": "hf://org/draft"}
KINDS = {
    "asp": ("AdaptiveSpeculator", names.SPECULATORS, SPECULATOR),
    "dver": ("DraftVersion", names.DRAFT_VERSIONS, DRAFT_VERSION),
    "dimp": ("DraftImport", names.DRAFT_IMPORTS, DRAFT_IMPORT),
}


def resource(kind: str, name: str = "chat", **spec: Any) -> Json:
    """A resource of a kind: the least one, and what is said more; None takes away."""
    title, _, least = KINDS[kind]
    return {
        "apiVersion": names.API_VERSION,
        "kind": title,
        "metadata": {"name": name},
        "spec": {name: value for name, value in {**least, **spec}.items() if value is not None},
    }


def at(path: str, value: Any) -> Json:
    """An object that has `value` at a path with dots."""
    for name in reversed(path.split(".")):
        value = {name: value}
    inside: Json = value
    return inside


def over(ours: Json, theirs: Json) -> Json:
    """Theirs over ours, in depth."""
    both = {
        name: over(ours[name], theirs[name]) for name in ours.keys() & theirs.keys() if isinstance(ours[name], dict)
    }
    return {**ours, **theirs, **both}


def apply(api: Api, namespace: str, kind: str, content: Json) -> Json:
    """Apply a resource as the one manager of all its fields: what is not said any more goes away."""
    path = f"{collection(namespace, KINDS[kind][1])}/{content['metadata']['name']}"
    return api.apply(path, content, manager="tests")


def create(api: Api, namespace: str, kind: str, content: Json) -> Json:
    """Make a new resource."""
    return api.create(collection(namespace, KINDS[kind][1]), content)
