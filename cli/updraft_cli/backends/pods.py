"""The serving pods of a speculator as Kubernetes knows them: whether they are ready, where they run, and on which device."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from updraft_cli.backends.objects import Json, time
from updraft_cli.backends.snapshot import PodState
from updraft_cli.backends.speculators import Condition

_SPECULATOR, _COMPONENT = "updraft.dev/speculator", "app.kubernetes.io/component"
_ATTACH = "updraft.dev/attach"
_SERVING = "serving"

SELECTORS = (f"{_SPECULATOR},{_COMPONENT}={_SERVING}", _ATTACH)
"""Label selectors of the serving pods of all speculators: the operator's own, and attached ones."""

_METRICS = ("metrics", "tls-metrics", "updraft-metrics", "http", "https")
"""Names of the container port that serves /metrics, the surest first."""

_WITH_TLS = ("tls-metrics", "https")

_ENDED = ("Succeeded", "Failed")


def owner(content: Json) -> str:
    """Return the name of the speculator that a pod belongs to."""
    labels = content["metadata"].get("labels", {})
    return str(labels.get(_SPECULATOR) or labels.get(_ATTACH, ""))


def pod(content: Json) -> PodState:
    metadata, spec, status = content["metadata"], content.get("spec", {}), content.get("status", {})
    statuses = status.get("containerStatuses", ())
    containers = spec.get("containers", ())
    ready = next((one for one in conditions(content) if one.type == "Ready"), None)
    is_ready = ready is not None and ready.status == "True"
    return PodState(
        name=metadata["name"],
        state=_state(metadata, status, is_ready=is_ready),
        problem="" if is_ready else _problem(status, ready),
        engine=containers[0].get("image", "") if containers else "",
        requested_device=_device(containers),
        node=spec.get("nodeName", ""),
        restarts=sum(one.get("restartCount", 0) for one in statuses),
        started=time(status.get("startTime")),
    )


class MetricsPort(NamedTuple):
    """Where a pod serves its metrics."""

    number: int
    scheme: str = "http"


def metrics_port(content: Json) -> MetricsPort | None:
    """Return the port that serves the pod's metrics; None if it has none of the known names."""
    spec = content.get("spec", {})
    containers = (*spec.get("initContainers", ()), *spec.get("containers", ()))  # an agent is a native sidecar
    ports = [port for one in containers for port in one.get("ports", ())]
    by_name = {port.get("name", ""): port["containerPort"] for port in ports}
    name = next((name for name in _METRICS if name in by_name), None)
    if name is None:
        return None
    return MetricsPort(by_name[name], "https" if name in _WITH_TLS else "http")


def conditions(content: Json) -> tuple[Condition, ...]:
    return tuple(
        Condition(
            type=one["type"],
            status=one["status"],
            reason=one.get("reason", ""),
            message=one.get("message", ""),
            since=time(one.get("lastTransitionTime")),
        )
        for one in content.get("status", {}).get("conditions", ())
    )


def _state(metadata: Json, status: Json, *, is_ready: bool) -> str:
    if metadata.get("deletionTimestamp"):
        return "draining"
    if is_ready:
        return "ready"
    if status.get("phase") in _ENDED or any(reason in _FATAL for reason, _ in _waiting(status)):
        return "failed"
    return "not ready"


_FATAL = frozenset(
    {
        *("CrashLoopBackOff", "Error", "OOMKilled"),
        *("ImagePullBackOff", "ErrImagePull", "InvalidImageName"),
        *("CreateContainerConfigError", "CreateContainerError", "RunContainerError"),
    }
)


def _problem(status: Json, ready: Condition | None) -> str:
    for reason, message in _waiting(status):
        return f"{reason}: {message}" if message else reason
    if status.get("message") or status.get("reason"):
        return str(status.get("message") or status["reason"])
    return (ready.message or ready.reason) if ready is not None else "it is not scheduled yet"


def _waiting(status: Json) -> Iterator[tuple[str, str]]:
    """Yield reason and message of the containers that wait or have ended."""
    for one in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        for kind in ("waiting", "terminated"):
            state: Any = one.get("state", {}).get(kind)
            if state and state.get("reason") != "Completed":
                yield state.get("reason", kind), state.get("message", "")


def _device(containers: tuple[Json, ...]) -> str:
    """Return what the pod asks for: `2 nvidia.com/gpu`; empty for nothing by that way, which need not mean a CPU."""
    for container in containers:
        limits = container.get("resources", {}).get("limits", {})
        for name, count in limits.items():
            if "/" in name and not name.startswith("hugepages"):
                return f"{count} {name}"
    return ""
