"""Speculators as the operator reads them, and access to the manifests that it builds from them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests import registry, serving, trainer
from updraft_operator.manifests.manifest import Images, Manifest, OperatorConfig

IMAGES = Images(
    inference="inference:1",
    trainer="trainer:1",
    registry="registry:1",
    operator="operator:1",
    sglang="sglang:1",
    vllm="vllm:1",
)
CONFIG = OperatorConfig(images=IMAGES, namespace="updraft-system", has_redis=True)
CONFIG_WITHOUT_REDIS = OperatorConfig(images=IMAGES, namespace="updraft-system", has_redis=False)
"""The operator has no Redis."""

ATTACHED: dict[str, Any] = {
    "engine": {"type": "VLLM"},
    "serving": {"mode": "Attached", "attached": {"selector": {"matchLabels": {"app": "vllm"}}}},
}
"""The fields of a speculator for pods of another workload."""

UID = "0e6f3a52-0000-4000-8000-000000000001"
PARTS = ("serving", "trainer", "registry")


def speculator(
    spec: Mapping[str, Any] | None = None,
    *,
    uri: str = "/models/tiny",
    status: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> AdaptiveSpeculator:
    """Speculator team/qwen; `spec` is written as in YAML, and its target comes from `uri`."""
    spec_fields = {**(spec or {})}
    spec_fields["targetModel"] = {"uri": uri, **spec_fields.get("targetModel", {})}
    named = {"name": "qwen", "namespace": "team", "uid": UID, "generation": 1, "resourceVersion": "1"}
    return AdaptiveSpeculator.model_validate(
        {"metadata": {**named, **metadata}, "spec": spec_fields, "status": dict(status or {})}
    )


def built(owner: AdaptiveSpeculator, config: OperatorConfig = CONFIG) -> list[Manifest]:
    """All objects of the three parts."""
    return [*registry.objects(owner, config), *trainer.objects(owner, config), *serving.objects(owner, config)]


def one(objects: Iterable[Manifest], kind: str, name: str) -> Manifest:
    """The object of this kind and name."""
    (found,) = (each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def templates(objects: Iterable[Manifest]) -> dict[str, Manifest]:
    """Pod templates by the names of their objects."""
    return {
        each["metadata"]["name"]: each["spec"]["template"] for each in objects if "template" in each.get("spec", {})
    }


def pod_spec(owner: AdaptiveSpeculator, part: str, config: OperatorConfig = CONFIG) -> dict[str, Any]:
    """The pod of a part."""
    spec: dict[str, Any] = templates(built(owner, config))[f"qwen-{part}"]["spec"]
    return spec


def container(pod: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A container or init container of a pod."""
    (found,) = (each for each in containers(pod) if each["name"] == name)
    return found


def containers(pod: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All containers of a pod, init containers first."""
    yield from pod.get("initContainers", ())
    yield from pod["containers"]


def named(entries: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:

    return {each["name"]: each for each in entries}


_RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def breaches(pod: Mapping[str, Any]) -> list[str]:
    """Violations of the restricted Pod Security standard."""
    found = [field for field in ("hostNetwork", "hostPID", "hostIPC") if pod.get(field)]
    whole = pod.get("securityContext", {})
    volumes = pod.get("volumes", ())
    found += [f"volume {each['name']}" for each in volumes if not each.keys() - {"name"} <= _RESTRICTED_VOLUMES]
    for each in containers(pod):
        context = each.get("securityContext", {})
        asked = {
            "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is False,
            "capabilities": context.get("capabilities", {}).get("drop") == ["ALL"]
            and set(context.get("capabilities", {}).get("add", ())) <= {"NET_BIND_SERVICE"},
            "privileged": not context.get("privileged"),
            "runAsNonRoot": context.get("runAsNonRoot", whole.get("runAsNonRoot")) is True,
            "runAsUser": context.get("runAsUser", whole.get("runAsUser")) != 0,
            "seccompProfile": context.get("seccompProfile", whole.get("seccompProfile", {})).get("type")
            in ("RuntimeDefault", "Localhost"),
            "hostPort": not any(port.get("hostPort") for port in each.get("ports", ())),
        }
        found += [f"{each['name']}: {what}" for what, is_kept in asked.items() if not is_kept]
    return found
