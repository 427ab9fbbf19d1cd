"""Pods of all parts: they meet the restricted Pod Security standard and read their settings from a ConfigMap."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, Storage, Workload
from updraft_operator.manifests.accounts import account, audience
from updraft_operator.manifests.manifest import Images, Manifest, digest, manifest
from updraft_operator.manifests.merge import merged

USER = 65532
"""User `nonroot` of most images, including ours."""

ACCESS = "/etc/updraft/access"
KUBERNETES = "/etc/updraft/kubernetes"
"""Token and CA of the API server, in the registry's pod only."""

TOKEN_S = 3600
"""Lifetime of a token. The kubelet renews the token when a fifth of its lifetime is left."""

DATA = {"name": "data", "mountPath": "/var/lib/updraft"}
TMP = {"name": "tmp", "emptyDir": {}}
SHM = {"name": "shm", "emptyDir": {"medium": "Memory"}}
SHM_MOUNT = {"name": "shm", "mountPath": "/dev/shm"}  # noqa: S108 - processes with GPUs share tensors there
_TMP_MOUNT = {"name": "tmp", "mountPath": "/tmp"}  # noqa: S108 - of the container, whose root is read-only

RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PodParts:
    containers: Sequence[dict[str, Any]]
    init_containers: Sequence[dict[str, Any]] = ()
    volumes: Sequence[dict[str, Any]] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings that its containers read at start from a ConfigMap or a Secret, whose change restarts the pod. Secret values
    appear only as hashes."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Additional fields of the pod's spec."""


def template(
    owner: AdaptiveSpeculator, part: str, parts: PodParts, workload: Workload, images: Images
) -> dict[str, Any]:
    """A pod template. It never contains a draft version, so that a new draft restarts nothing."""
    spec: dict[str, Any] = {
        "serviceAccountName": account(owner, part),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # NAME_PORT=tcp://... would look like settings
        "securityContext": {
            "runAsNonRoot": True,
            **({"runAsUser": USER, "runAsGroup": USER, "fsGroup": USER} if images.has_fixed_user else {}),
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": list(parts.containers),
        "volumes": [*parts.volumes, TMP],
        **parts.more,
    }
    if parts.init_containers:
        spec["initContainers"] = list(parts.init_containers)
    if images.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in images.pull_secrets]
    ours = {
        "metadata": {
            "labels": names.labels(owner.metadata.name, part),
            "annotations": {names.SETTINGS: digest(parts.settings)},
        },
        "spec": spec,
    }
    template_content = merged(ours, workload.pod_template)
    # Selectors and the operator's watches depend on these labels.
    return merged(template_content, {"metadata": {"labels": names.labels(owner.metadata.name, part)}})


def container(name: str, image: str, images: Images, workload: Workload, **content: Any) -> dict[str, Any]:
    """A container; the spec's environment variables and resources override the defaults."""
    env = {variable["name"]: variable for variable in (*content.pop("env", []), *workload.env)}
    mounts = [*content.pop("volumeMounts", []), _TMP_MOUNT]
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": images.pull_policy,
        **({"resources": workload.resources} if workload.resources else {}),
        "securityContext": RESTRICTED,
        "terminationMessagePolicy": "FallbackToLogsOnError",  # conditions quote the termination message
        "env": list(env.values()),
        "volumeMounts": mounts,
        **content,
    }


def settings(owner: AdaptiveSpeculator, part: str, values: Mapping[str, str]) -> Manifest:
    return manifest(owner, "v1", "ConfigMap", names.child(owner.metadata.name, part), part, data=dict(values))


def draft_sizes(owner: AdaptiveSpeculator, prefix: str) -> dict[str, str]:
    """The settings for the sizes that the spec chooses, of a process with this prefix."""
    chosen = owner.spec.draft.sizes
    return {f"{prefix}_DRAFT_{name.upper()}": str(size) for name, size in chosen.items()}


def from_settings(owner: AdaptiveSpeculator, part: str) -> list[dict[str, Any]]:
    return [{"configMapRef": {"name": names.child(owner.metadata.name, part)}}]


def token_volume(owner: AdaptiveSpeculator, file: str) -> dict[str, Any]:
    """A volume with one file: the token of the pod's ServiceAccount for the speculator's registry."""
    accepted_by = audience(owner.metadata.namespace, owner.metadata.name)
    token = {"path": file, "audience": accepted_by, "expirationSeconds": TOKEN_S}
    return {"name": "access", "projected": {"sources": [{"serviceAccountToken": token}], "defaultMode": 0o440}}


def kubernetes_volume() -> dict[str, Any]:
    """A volume with a token for the API server, and its CA. The token permits only what every account may read."""
    token = {"path": "token", "expirationSeconds": TOKEN_S}
    authority = {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    sources = [{"serviceAccountToken": token}, {"configMap": authority}]
    return {"name": "kubernetes", "projected": {"sources": sources, "defaultMode": 0o440}}


TOKEN_MOUNT = {"name": "access", "mountPath": ACCESS, "readOnly": True}
KUBERNETES_MOUNT = {"name": "kubernetes", "mountPath": KUBERNETES, "readOnly": True}


def variables(values: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def secret_variable(name: str, secret: str, key: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def probes(
    port: str, *, start_s: int, start_period_s: int = 5, live_period_s: int = 10, has_tls: bool = False
) -> dict[str, Any]:
    """Probes of a container that serves /healthz and /readyz, and may take `start_s` seconds to start."""
    failures = math.ceil(start_s / start_period_s)
    return {
        "startupProbe": http_probe("/healthz", port, period_s=start_period_s, failures=failures, has_tls=has_tls),
        "readinessProbe": http_probe("/readyz", port, period_s=5, failures=2, has_tls=has_tls),
        "livenessProbe": http_probe("/healthz", port, period_s=live_period_s, failures=6, has_tls=has_tls),
    }


def http_probe(path: str, port: str, *, period_s: int, failures: int, has_tls: bool = False) -> dict[str, Any]:
    """An HTTP probe. The timeout of 5 s is long for a trivial answer, but short for a node that swaps. A kubelet takes any
    certificate, as none names a pod's address."""
    return {
        "httpGet": {"path": path, "port": port, **({"scheme": "HTTPS"} if has_tls else {})},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def claim_spec(storage: Storage) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": storage.size}},
    }
    if storage.storage_class_name is not None:
        spec["storageClassName"] = storage.storage_class_name
    return spec
