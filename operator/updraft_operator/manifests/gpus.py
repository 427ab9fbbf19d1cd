"""GPUs of the serving pods, by the names that device plugins give them."""

import re
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from updraft_operator.api.speculator import Serving, Spec

_GPU = re.compile(r"/(gpu|gpu\.[^/]+|mig-[^/]+)$")
"""nvidia.com/gpu, nvidia.com/gpu.shared, nvidia.com/mig-1g.10gb, amd.com/gpu."""

_PARALLELISM = re.compile(r"--?(tp|pp|dp|(tensor|pipeline|data)[-_]parallel)")
"""Beginnings of the options of SGLang and vLLM that change the number of GPUs."""


def num_gpus(resources: dict[str, Any]) -> int:
    """Number of GPUs in the limits; Kubernetes requires the requests of such resources to be equal."""
    return sum(_number(amount) for name, amount in _limits(resources).items() if _GPU.search(name))


def mismatch(spec: Spec) -> str:
    """Why the pods would have another number of GPUs than their engine uses; empty if they would not, or if `engine.args`
    choose how many it uses."""
    requested, used = num_gpus(spec.serving.resources), spec.engine.tensor_parallel_size
    if requested == used or any(_PARALLELISM.match(argument) for argument in spec.engine.args):
        return ""
    size, limits = f"spec.engine.tensorParallelSize is {used}", "spec.serving.resources.limits request"
    if requested:
        remedy = "set both to the same number (above 1 only with engine SGLang)"
        return f"{size}, but {limits} {requested} GPUs: {remedy}"
    if used > 1 and not _has_other_devices(spec.serving):
        return f"{size}, but {limits} no GPU: add {used} of them, for example nvidia.com/gpu: {used}"
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
