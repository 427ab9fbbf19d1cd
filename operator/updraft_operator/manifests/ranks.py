"""The pods of a trainer of more than one rank: what runs them, their names, and how they meet.

Every pod runs `updraft-trainer ranks`, which is torchrun: it starts the pod's ranks once all pods have met at the first one,
and restarts the ranks of all pods when one is lost. The pods of a StatefulSet start together (Parallel), and the operator
replaces them together (OnDelete, `planning.trainers`): ranks of two templates must not train one draft. Refused: a
PodDisruptionBudget, because an eviction costs at most a minute of learning, and a budget would block the draining of nodes.
"""

from enum import StrEnum
from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests import pod
from updraft_operator.manifests.manifest import Manifest, manifest, owner_reference

PORT = 29400
"""Where the pods meet, at the first one. Ranks then talk on ports that gloo and NCCL choose."""

POD_NAME = "UPDRAFT_TRAINER_POD_NAME"
"""Variable with the pod's name. Its host name is the node's on the network of the host, and others need not know that."""


class Kind(StrEnum):
    """The kind of object that runs the trainer's pods."""

    DEPLOYMENT = "Deployment"
    """One rank."""
    STATEFUL_SET = "StatefulSet"
    LEADER_WORKER_SET = "LeaderWorkerSet"


def workload(speculator: str, kind: Kind) -> str:
    """The object's name. A LeaderWorkerSet makes a StatefulSet and a Service of its own name, so that is another one.

    It is short: a label of the workers' pods holds it with `-0-` and a hash of 10 characters, and has at most 63.
    """
    return names.child(speculator, "ranks" if kind is Kind.LEADER_WORKER_SET else names.TRAINER)


def pods(speculator: str, kind: Kind, num_pods: int) -> list[str]:
    """Names of the pods, the first one first. A Deployment's pod is named as if it were a StatefulSet's, for its claim."""
    first = f"{workload(speculator, kind)}-0"
    if kind is Kind.LEADER_WORKER_SET:
        return [first, *(f"{first}-{number}" for number in range(1, num_pods))]
    return [f"{workload(speculator, kind)}-{number}" for number in range(num_pods)]


def claims(owner: AdaptiveSpeculator, kind: Kind) -> list[Manifest]:
    """A volume per pod, named as a StatefulSet names it. Those of pods that are gone stay until the resource is deleted."""
    storage = owner.spec.trainer.storage
    if storage.claim_name is not None:
        return []
    content = pod.claim_spec(storage)
    return [
        manifest(owner, "v1", "PersistentVolumeClaim", names.claim(each), names.TRAINER, spec=content)
        for each in pods(owner.metadata.name, kind, owner.spec.trainer.nodes)
    ]


def endpoint(owner: AdaptiveSpeculator, kind: Kind) -> str:
    """host:port of the first pod."""
    name = owner.metadata.name
    return f"{pods(name, kind, 1)[0]}.{workload(name, kind)}:{PORT}"


def arguments(owner: AdaptiveSpeculator, kind: Kind) -> list[str]:
    """Arguments of the container."""
    trainer = owner.spec.trainer
    return [
        *("ranks", "--nodes", str(trainer.nodes), "--ranks-per-node", str(trainer.ranks_per_pod)),
        *("--endpoint", endpoint(owner, kind), "--id", owner.metadata.uid or owner.metadata.name),
        # A name, because torchrun numbers the pods in the order of their addresses, and an IP address changes with the pod:
        # if another pod gets rank 0, torch 2.13 sends the former one to its own old store, and the ranks never meet.
        *("--address", f"$({POD_NAME}).{workload(owner.metadata.name, kind)}"),
    ]


def objects(owner: AdaptiveSpeculator, kind: Kind, template: dict[str, Any], *, runs: bool) -> list[Manifest]:
    """The objects that run the pods. A LeaderWorkerSet brings a Service of its own."""
    if kind is Kind.LEADER_WORKER_SET:
        return [_leader_worker_set(owner, template, runs=runs)]
    return [_service(owner), _stateful_set(owner, template, runs=runs)]


def _stateful_set(owner: AdaptiveSpeculator, template: dict[str, Any], *, runs: bool) -> Manifest:
    name = workload(owner.metadata.name, Kind.STATEFUL_SET)
    content: dict[str, Any] = {
        "replicas": owner.spec.trainer.nodes if runs else 0,
        "serviceName": name,
        "podManagementPolicy": "Parallel",
        "updateStrategy": {"type": "OnDelete"},
        "selector": {"matchLabels": names.selector(owner.metadata.name, names.TRAINER)},
        "template": template,
        # The claims belong to the resource: see `claims`.
        "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Retain", "whenScaled": "Retain"},
        # Kubernetes makes the claim of a pending pod again, and does so between the deletion of the claim and of the
        # StatefulSet. Without an owner, that claim would stay.
        **_claim_templates(owner, ownerReferences=[owner_reference("AdaptiveSpeculator", owner.metadata)]),
    }
    return manifest(owner, "apps/v1", Kind.STATEFUL_SET.value, name, names.TRAINER, spec=content)


def _leader_worker_set(owner: AdaptiveSpeculator, template: dict[str, Any], *, runs: bool) -> Manifest:
    """One group, which its controller starts and replaces together."""
    name = workload(owner.metadata.name, Kind.LEADER_WORKER_SET)
    group: dict[str, Any] = {
        "size": owner.spec.trainer.nodes,
        "restartPolicy": "RecreateGroupOnPodRestart",
        "workerTemplate": template,
        "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Retain", "whenScaled": "Retain"},
        **_claim_templates(owner),
    }
    content = {
        "replicas": int(runs),
        "startupPolicy": "LeaderCreated",  # the first pod is not ready before the others are there
        "networkConfig": {"subdomainPolicy": "Shared"},
        "leaderWorkerTemplate": group,
    }
    return manifest(owner, names.LWS_API_VERSION, Kind.LEADER_WORKER_SET.value, name, names.TRAINER, spec=content)


def _claim_templates(owner: AdaptiveSpeculator, **metadata: Any) -> dict[str, Any]:
    storage = owner.spec.trainer.storage
    if storage.claim_name is not None:
        return {}
    labels = names.labels(owner.metadata.name, names.TRAINER)
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "data", "labels": labels, **metadata},
        "spec": pod.claim_spec(storage),
    }
    return {"volumeClaimTemplates": [claim]}


def _service(owner: AdaptiveSpeculator) -> Manifest:
    name = workload(owner.metadata.name, Kind.STATEFUL_SET)
    content = {
        "clusterIP": "None",
        "selector": names.selector(owner.metadata.name, names.TRAINER),
        "ports": [{"name": "rendezvous", "port": PORT, "targetPort": PORT, "protocol": "TCP"}],
        "publishNotReadyAddresses": True,  # they become ready only after they have met
    }
    return manifest(owner, "v1", "Service", name, names.TRAINER, spec=content)
