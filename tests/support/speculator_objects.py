"""Small but complete AdaptiveSpeculators, DraftVersions and DraftImports as the API server stores them."""

from typing import Any

API_VERSION = "updraft.dev/v1alpha1"
Json = dict[str, Any]

SINCE = "2026-11-24T11:55:00Z"


def speculator(name: str = "qwen", *, rollout: Json | None = None, status: Json | None = None, **spec: Any) -> Json:
    """A speculator that is ready and serves version 2; `rollout`, `spec` and the fields of `status` are merged in."""
    return {
        "apiVersion": API_VERSION,
        "kind": "AdaptiveSpeculator",
        "metadata": {"name": name, "namespace": "team", "generation": 3},
        "spec": {
            "targetModel": {"uri": "hf://org/qwen"},
            "engine": {"type": "Torch"},
            "serving": {"replicas": 2},
            "rollout": {"strategy": "Canary", "paused": False, **(rollout or {})},
            **spec,
        },
        "status": {**ready(), **(status or {})},
    }


def ready(*conditions: Json) -> Json:
    """A status of a ready speculator, with these conditions instead of those of the same types."""
    by_type = {each["type"]: each for each in (*_TRUE, *conditions)}
    return {
        "observedGeneration": 3,
        "versions": {"stable": 2, "previous": 1, "latest": 2},
        "rollout": {"phase": "Stable", "version": 2, "message": "version 2 is stable"},
        "serving": {
            "replicas": 2,
            "readyReplicas": 2,
            "updatedReplicas": 2,
            "failedReplicas": 0,
            "url": "http://qwen.team.svc/v1",
        },
        "acceptance": {"stable": "2.59", "verifySteps": 12000},
        "trainer": {"state": "Training", "lastPublishTime": SINCE},
        "conditions": list(by_type.values()),
    }


def condition(kind: str, status: str, reason: str, message: str = "") -> Json:
    """One condition, five minutes before noon."""
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": SINCE}


def version(number: int, phase: str, *, owner: str = "qwen", reason: str = "", **more: Any) -> Json:
    """A DraftVersion."""
    spec: Json = {"speculatorRef": {"name": owner}, "source": "Trainer", "retain": False}
    spec |= {"version": number, "digest": f"sha256:{number:064x}"}
    return {
        "apiVersion": API_VERSION,
        "kind": "DraftVersion",
        "metadata": {
            "name": f"{owner}-v{number}",
            "namespace": "team",
            "creationTimestamp": "2026-11-24T10:00:00Z",
        },
        "spec": spec,
        "status": {"phase": phase, "reason": reason, "history": [], **more},
    }


def draft_import(*conditions: Json, version: int | None = None) -> Json:
    """A DraftImport; without a version one that the registry has not numbered yet."""
    status: Json = {"conditions": [*conditions], **({"version": version} if version else {})}
    return {
        "apiVersion": API_VERSION,
        "kind": "DraftImport",
        "metadata": {"name": "qwen-mine", "namespace": "team"},
        "spec": {"speculatorRef": {"name": "qwen"}, "uri": "hf://org/draft"},
        "status": status,
    }


def moment(minute: int, phase: str, reason: str = "", actor: str = "registry") -> Json:
    """A change of phase."""
    return {"time": f"2026-11-24T11:{minute:02}:00Z", "phase": phase, "actor": actor, "reason": reason}


_TRUE = (
    condition("Ready", "True", "Ready", "requests are served"),
    condition("Accepted", "True", "SpecAccepted", "the spec can be followed"),
    condition("Available", "True", "PodsReady", "2 of 2 pods are ready"),
    condition("RegistryReady", "True", "Connected", "the registry answers"),
    condition("TrainerReady", "True", "Training", "the trainer runs"),
    condition("Adapting", "True", "Adapting", "drafts are learned from the traffic"),
    condition("SpeculationEffective", "True", "Effective", "speculation saves decoding steps on this traffic"),
    condition("Progressing", "True", "Complete", "version 2 serves"),
)
