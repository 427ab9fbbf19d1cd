"""GPUs that the spec requests for a container, by the names that device plugins give them."""

import re
from typing import Any

from kubernetes.utils.quantity import parse_quantity

_GPU = re.compile(r"/(gpu|gpu\.[^/]+|mig-[^/]+)$")
"""nvidia.com/gpu, nvidia.com/gpu.shared, nvidia.com/mig-1g.10gb, amd.com/gpu."""


def num_gpus(resources: dict[str, Any]) -> int:
    """Number of GPUs in the limits; Kubernetes requires the requests of such resources to be equal."""
    return sum(_number(amount) for name, amount in limits(resources).items() if _GPU.search(name))


def limits(resources: dict[str, Any]) -> dict[str, Any]:
    found = resources.get("limits")
    return found if isinstance(found, dict) else {}


def _number(amount: object) -> int:
    try:
        return int(float(parse_quantity(amount)))
    except (ValueError, OverflowError):  # the API server refuses the pod
        return 0
