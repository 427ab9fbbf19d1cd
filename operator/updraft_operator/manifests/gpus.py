"""GPUs of the serving pods, by the names that device plugins give them."""

import re
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from updraft_operator.api.speculator import Serving, Spec
from updraft_operator.manifests.merge import merged

_GPU = re.compile(r"/(gpu|gpu\.[^/]+|mig-[^/]+)$")
"""nvidia.com/gpu, nvidia.com/gpu.shared, nvidia.com/mig-1g.10gb, amd.com/gpu."""

_PARALLELISM = re.compile(r"--?(tp|pp|dp|(tensor|pipeline|data)[-_]parallel)")
"""Beginnings of the options of SGLang and vLLM that change the number of GPUs."""


def num_gpus(resources: dict[str, Any]) -> int:
    """Number of GPUs in the limits; Kubernetes requires the requests of such resources to be equal."""
    return sum(_number(amount) for name, amount in _limits(resources).items() if _GPU.search(name))


def num_devices(spec: Spec) -> int:
    """Number of devices that a pod is known to get: those of the accelerator, or else the GPUs in its resources."""
    accelerator = spec.serving.accelerator
    if accelerator is None:
        return num_gpus(spec.serving.resources)
    return accelerator.per_pod or spec.engine.tensor_parallel_size


def resources(spec: Spec) -> dict[str, Any]:
    """The resources of the container with the engine: the spec's, with its accelerators."""
    accelerator = spec.serving.accelerator
    if accelerator is None:
        return spec.serving.resources
    return with_devices(spec.serving.resources, accelerator.resource_name, num_devices(spec))


def with_devices(resources: dict[str, Any], name: str, count: int) -> dict[str, Any]:
    """The resources with so many devices, which Kubernetes wants in requests and limits alike."""
    devices = {name: str(count)}
    return merged(resources, {"requests": devices, "limits": devices})


def mismatch(spec: Spec) -> str:
    """Why the pods would have another number of GPUs than their engine uses; empty if they would not, or if `engine.args`
    choose how many it uses."""
    requested, used = num_devices(spec), spec.engine.tensor_parallel_size
    if spec.serving.accelerator is not None and num_gpus(spec.serving.resources):
        return (
            "spec.serving.resources.limits and spec.serving.accelerator both request GPUs: remove them from resources"
        )
    if requested == used or any(_PARALLELISM.match(argument) for argument in spec.engine.args):
        return ""
    size, limits = f"spec.engine.tensorParallelSize is {used}", "spec.serving.resources.limits request"
    if spec.serving.accelerator is not None:
        return (
            f"{size}, but spec.serving.accelerator.perPod is {requested}: leave perPod out to get as many as are used"
        )
    if requested:
        remedy = "set both to the same number (above 1 only with engine SGLang or VLLM)"
        return f"{size}, but {limits} {requested} GPUs: {remedy}"
    if used > 1 and not _has_other_devices(spec.serving):
        return f"{size}, but {limits} no GPU: set spec.serving.accelerator"
    return ""


def _has_other_devices(serving: Serving) -> bool:
    """Whether GPUs may come in another way: as a resource of another name, by a claim, or from the pod template."""
    pod = serving.pod_template.get("spec")
    return (
        any("/" in name and not _GPU.search(name) for name in _limits(serving.resources))
        or "claims" in serving.resources
        or (isinstance(pod, dict) and "containers" in pod)
    )


def _limits(resources: dict[str, Any]) -> dict[str, Any]:
    found = resources.get("limits")
    return found if isinstance(found, dict) else {}


def _number(amount: object) -> int:
    try:
        return int(float(parse_quantity(amount)))
    except (ValueError, OverflowError):  # the API server refuses the pod
        return 0
