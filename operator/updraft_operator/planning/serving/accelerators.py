"""Whether engines and trainer run on the accelerators that the spec requests, by the device that each reports.

A pod may hold a GPU and compute on CPUs: the image has no build for it, or a variable names another device.
"""

from collections.abc import Iterator

from updraft_operator.manifests.gpus import num_devices
from updraft_operator.planning import trainers
from updraft_operator.planning.assessment import Assessment, false, true, unknown
from updraft_operator.planning.observed import ConnectionState, Observed, learning_of

_NAMED = 3
"""Pods that a message names; it counts the others."""


def accelerators(observed: Observed) -> Iterator[Assessment]:
    """The condition AcceleratorInUse; nothing without requested accelerators. Pods of other workloads request their own."""
    spec = observed.speculator.spec
    serves = not spec.serving.is_attached and num_devices(spec) > 0
    if not serves and spec.trainer.accelerator is None:
        return
    if spec.suspend or not (serves or _trains(observed)):
        where = (
            "spec.suspend is true"
            if spec.suspend
            else "no trainer runs, by spec.trainer.suspend or spec.traces.enabled"
        )
        yield unknown("Suspended", where)
    if observed.registry.connection is not ConnectionState.CONNECTED:
        yield from _before(observed)
        yield unknown("RegistryNotReady", "the devices in use are not known without the registry")
    devices = {pod.pod: pod.device for pod in observed.registry.pods if pod.device} if serves else {}
    fallen = sorted(name for name, device in devices.items() if _is_cpu(device))
    if fallen:
        yield false("CPUFallback", f"{_listed(fallen)}: the engine runs on CPUs, although the pod has accelerators")
    if _trains(observed) and trainers.is_on_cpu(observed):
        yield false("CPUFallback", f"{trainers.devices(observed)}, although spec.trainer.accelerator gives it more")
    if serves and not devices:
        yield unknown("NotReported", "no inference pod has reported its device yet")
    if _trainer_is_silent(observed):
        yield unknown("NotReported", "the trainer has not reported its device yet")
    yield true("InUse", _summary(observed, sorted(set(devices.values()))))


def _is_cpu(device: str) -> bool:
    return device.partition(":")[0].partition(" ")[0] == "cpu"


def _listed(pods: list[str]) -> str:
    others = len(pods) - _NAMED
    return ", ".join(pods[:_NAMED]) + (f" and {others} more" if others > 0 else "")


def _trainer_is_silent(observed: Observed) -> bool:
    learning = learning_of(observed.registry.state)
    return _trains(observed) and (learning is None or not learning.device)


def _trains(observed: Observed) -> bool:
    """Whether a trainer is wanted, with accelerators."""
    spec = observed.speculator.spec
    return spec.trainer.accelerator is not None and spec.traces.enabled and not spec.trainer.suspend


def _summary(observed: Observed, devices: list[str]) -> str:
    engines = [f"inference pods run on {', '.join(devices)}"] if devices else []
    trainer = [trainers.devices(observed)] if _trains(observed) else []
    return "; ".join((*engines, *trainer))


def _before(observed: Observed) -> Iterator[Assessment]:
    """The previous assessment, until the registry has sent its state to this process."""
    for condition in observed.speculator.status.conditions:
        if condition.type == "AcceleratorInUse" and observed.registry.connection is ConnectionState.CONNECTING:
            yield Assessment(condition.status, condition.reason, condition.message)
