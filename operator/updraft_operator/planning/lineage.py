"""The line of drafts that a speculator's versions descend from: how it starts, and which sizes its drafts have.

A lineage starts from a published draft if the spec names one, else from what the trainer makes. SGLang and vLLM build a draft's
network once, so their pods restart, one after the other, when drafts of other sizes are to serve.
"""

import json
from typing import Any

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.api.speculator import EngineType
from updraft_operator.manifests.manifest import Manifest, digest, manifest
from updraft_operator.manifests.servers import attachment, server
from updraft_operator.planning import imports, trainers
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import Observed

_SHAPE = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "draft_vocab_size",
    "rms_norm_eps", "rope_theta", "rope_scaling",
)  # fmt: skip
"""Keys of a draft's config.json that a server reads once."""


def initial_import(observed: Observed) -> Manifest | None:
    """The DraftImport of the draft that the spec names; None if it exists with its Secret, or none is named."""
    initial = observed.speculator.spec.draft.initial
    if initial is None:
        return None
    known = next((one for one in observed.imports if one.metadata.name == initial_name(observed)), None)
    if known is not None and initial.secret_ref in (None, known.spec.secret_ref):
        return None
    fields = initial.model_dump(mode="json", by_alias=True, exclude_none=True)
    spec = {"speculatorRef": {"name": observed.name}, **fields}
    return manifest(observed.speculator, names.API_VERSION, "DraftImport", initial_name(observed), "draft", spec=spec)


def initial_name(observed: Observed) -> str:
    """The name of its DraftImport. Another draft has another name, because a DraftImport is immutable."""
    initial = observed.speculator.spec.draft.initial
    assert initial is not None
    identity = digest({"uri": initial.uri, "digest": initial.digest})
    return f"{observed.name}-initial-{identity[:8]}"


def waits(observed: Observed) -> str:
    """Why the trainer waits for the draft that it has to continue; empty if it does not wait."""
    initial = observed.speculator.spec.draft.initial
    if initial is None or observed.registry.versions:
        return ""
    if not observed.registry.is_connected and _trains(observed):
        return ""
    name = initial_name(observed)
    state = next((state for state in imports.states(observed) if state.draft_import.metadata.name == name), None)
    if state is not None and state.registered is not None:
        return ""
    if state is not None and state.failure:
        return f"the import of {initial.uri} failed, so there is no draft to start from: {state.failure}"
    return f"the trainer waits for the import of {initial.uri}"


def draft_config(observed: Observed) -> str:
    """The config.json whose sizes the initial draft of a server's pods has; empty for the sizes of the spec.

    It is that of the version for which pods report that their server has to restart. Otherwise the pods keep what they have.
    """
    if observed.speculator.spec.engine.type is EngineType.TORCH:
        return ""
    current, awaited = _current(observed), _awaited(observed)
    if awaited is None or _content(awaited.config_json).get("norm_before_residual"):  # pods refuse that
        return current
    return current if _shape(awaited.config_json) == _shape(current) else awaited.config_json


def _awaited(observed: Observed) -> pb.Manifest | None:
    """The stable version, or else the first in canary, if pods wait for a restart with its sizes and none serves it.

    A pod that serves it proves that its shape is that of the pods, whose sizes the operator does not know otherwise.
    """
    state = observed.registry.state
    if not observed.registry.is_connected or state is None:
        return None
    num_serving = state.pods.serving_stable if state.stable else state.pods.serving_candidate
    if num_serving or not state.pods.waiting_for_restart:
        return None
    number = state.stable or state.candidate
    return next((version.manifest for version in observed.registry.versions if version.version == number), None)


def _trains(observed: Observed) -> bool:
    return any(workload.live()["spec"].get("replicas") for workload in trainers.workloads(observed))


def _current(observed: Observed) -> str:
    if observed.speculator.spec.serving.is_attached:
        described = observed.children.get(Ref("ConfigMap", attachment.config_map(observed.name)))
        return "" if described is None else str((described.live().get("data") or {}).get(attachment.DRAFT_CONFIG, ""))
    deployment = observed.child("Deployment", names.SERVING)
    return "" if deployment is None else server.draft_config_of(deployment.live()["spec"]["template"]["spec"])


def _content(config_json: str) -> dict[str, Any]:
    try:
        content = json.loads(config_json or "{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _shape(config_json: str) -> tuple[Any, ...]:
    content = _content(config_json)
    return tuple(content.get(key) for key in _SHAPE)
