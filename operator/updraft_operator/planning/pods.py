"""A pod's status in short: whether it is ready and, if not, a reason that a person can act on.

Only the pod's own status is read. Refused: reading Events, which are deleted after an hour and are meant for people.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from updraft_operator.api import names
from updraft_operator.masking import masked

_PULL = {"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
_MODEL = ("model", "updraft-model")
"""Names of the init container that downloads the target, in our pods and in others."""

_LOGGED = re.compile(r'"message": ("(?:[^"\\]|\\.)*")')
"""The message in a line of JSON, which may be cut: a container's termination message has at most 2 kB."""

_SCHEDULER: Mapping[str, re.Pattern[str]] = {
    "InsufficientGPU": re.compile(r"Insufficient \S*(gpu|/mig-)", re.IGNORECASE),
    "ClaimNotAllocated": re.compile(r"allocate all claims|resource ?claim", re.IGNORECASE),
}
"""Reasons by the scheduler's words: of device plugins, MIG slices among them, and of dynamic resource allocation (DRA)."""

_NO_NODE = "Unschedulable"
WAITS_FOR_A_PLACE = ("Queued", "SchedulingGated", *_SCHEDULER, _NO_NODE)
"""Reasons of pods that no node has yet: they may wait for one that ends."""

_KUEUE = "kueue.x-k8s.io/"
"""Start of its labels and scheduling gates: admission by quota, and the place in a topology."""

_RESTARTED = 1
"""Number of restarts from which a failed container is reported as CrashLoopBackOff."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodProblem:
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PodState:
    """The part of a pod that plans depend on."""

    name: str
    part: str
    is_ready: bool
    is_ending: bool
    is_finished: bool
    """Its containers have ended for good, for example after an eviction; its controller counts it no longer."""
    problem: PodProblem | None
    """None while the pod is starting normally, too."""
    revision: str = ""
    """Revision of the template that it was made from, of a StatefulSet's pod."""
    created_s: float | None = None
    """Unix time of its creation."""
    ready_s: float | None = None
    """Unix time since when it is ready; None if it is not."""
    startup_s: float | None = None
    """Time from its creation until it was ready; None if it is not, or if a container restarted."""
    uid: str = ""
    result: str = ""
    """Termination message of its first container, once that has succeeded."""

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> "PodState":
        metadata, status = body["metadata"], body.get("status", {})
        conditions = {entry["type"]: entry for entry in status.get("conditions", ())}
        created_s, ready_s = _created_s(metadata), _ready_s(conditions)
        return cls(
            name=metadata["name"],
            part=metadata.get("labels", {}).get(names.COMPONENT, ""),
            is_ready=conditions.get("Ready", {}).get("status") == "True",
            is_ending="deletionTimestamp" in metadata,
            is_finished=status.get("phase") in ("Failed", "Succeeded"),
            problem=next(map(_shown, _troubles(body, status, conditions)), None),
            revision=metadata.get("labels", {}).get("controller-revision-hash", ""),
            created_s=created_s,
            ready_s=ready_s,
            startup_s=_startup_s(status, created_s, ready_s),
            uid=metadata.get("uid", ""),
            result=_result(status),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachedPod:
    """A pod of somebody else's workload."""

    state: PodState
    problem: PodProblem | None
    """The first thing that it lacks, by its spec."""
    settings: str
    """Which additions it was made with; see `attachment.settings_mark`."""
    is_ours: bool
    """Whether its agent has the settings of this speculator."""
    has_settled: bool
    """Whether it has been ready for so long that its agent should have reported."""
    redis_secrets: tuple[str, ...] = ()
    """Names of the Secrets from which its agent got the address of a Redis when it started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The pods that a speculator selects."""

    pods: tuple[AttachedPod, ...] = ()
    problem: str = ""
    """Why they could not be listed now: then these are those of the last listing."""

    @property
    def states(self) -> tuple[PodState, ...]:
        """States of the pods with an agent of this speculator; the others do not count."""
        return tuple(pod.state for pod in self.pods if pod.is_ours)


def _created_s(metadata: Mapping[str, Any]) -> float | None:
    created = metadata.get("creationTimestamp")
    return datetime.fromisoformat(created).timestamp() if created else None


def _ready_s(conditions: Mapping[str, Any]) -> float | None:
    ready = conditions.get("Ready", {})
    if ready.get("status") != "True" or "lastTransitionTime" not in ready:
        return None
    return datetime.fromisoformat(ready["lastTransitionTime"]).timestamp()


def _startup_s(status: Mapping[str, Any], created_s: float | None, ready_s: float | None) -> float | None:
    has_restarted = any(container.get("restartCount") for container in status.get("containerStatuses", ()))
    if created_s is None or ready_s is None or has_restarted:
        return None
    return max(0.0, ready_s - created_s)


def worst(pods: Iterable[PodState]) -> tuple[PodState, PodProblem] | None:
    """The first pod with a problem in the order of names, so that the same pods always give the same message."""
    for pod in sorted(pods, key=lambda pod: pod.name):
        if pod.problem is not None and not pod.is_ending:
            return pod, pod.problem
    return None


def _shown(problem: PodProblem) -> PodProblem:
    """Its message is foreign text, and whoever may read the resource sees it."""
    return replace(problem, message=masked(problem.message))


def _troubles(
    body: Mapping[str, Any], status: Mapping[str, Any], conditions: Mapping[str, Any]
) -> Iterator[PodProblem]:
    scheduled = conditions.get("PodScheduled", {})
    if not scheduled and not body.get("spec", {}).get("nodeName"):
        yield from _unclaimed(body)
    if scheduled.get("status") == "False":
        yield from _gated(body)
        yield _unscheduled(scheduled.get("message", ""))
    for container in status.get("initContainerStatuses", ()):
        yield from _of_container(container, is_init=True)
    for container in status.get("containerStatuses", ()):
        yield from _of_container(container, is_init=False)
    if status.get("phase") == "Failed" and status.get("reason"):  # evicted, preempted, node lost
        message = f"{status['reason']}: {status.get('message', '')}".strip(": ")
        yield PodProblem(reason="CrashLoopBackOff", message=message)


def _gated(body: Mapping[str, Any]) -> Iterator[PodProblem]:
    """Why the scheduler does not even look for a node: a controller has to remove the pod's gates first."""
    gates = [gate["name"] for gate in body.get("spec", {}).get("schedulingGates", ())]
    if any(gate.startswith(_KUEUE) for gate in gates):
        queue = body["metadata"].get("labels", {}).get(f"{_KUEUE}queue-name", "no queue")
        yield PodProblem(reason="Queued", message=f"Kueue has not admitted it yet ({queue}; gates {', '.join(gates)})")
    if gates:
        yield PodProblem(reason="SchedulingGated", message=f"it waits for the removal of gates {', '.join(gates)}")


def _unclaimed(body: Mapping[str, Any]) -> Iterator[PodProblem]:
    """Claims that may not exist: the scheduler says nothing of a pod that lacks one. Only of claims from templates does the pod
    say that they are made."""
    made = {each["name"] for each in body.get("status", {}).get("resourceClaimStatuses", ())}
    for claim in body.get("spec", {}).get("resourceClaims", ()):
        template, named = claim.get("resourceClaimTemplateName"), claim.get("resourceClaimName")
        if template and claim["name"] not in made:
            text = f"claim {claim['name']} is not made yet from ResourceClaimTemplate {template}; does that exist?"
            yield PodProblem(reason="ClaimNotAllocated", message=text)
        if named:
            text = f"the scheduler has not looked at it yet; does ResourceClaim {named} exist?"
            yield PodProblem(reason="ClaimNotAllocated", message=text)


def _unscheduled(message: str) -> PodProblem:
    reason = next((reason for reason, words in _SCHEDULER.items() if words.search(message)), _NO_NODE)
    return PodProblem(reason=reason, message=message or "no node fits the pod yet")


def _of_container(container: Mapping[str, Any], *, is_init: bool) -> Iterator[PodProblem]:
    state, name = container.get("state", {}), container["name"]
    ended = state.get("terminated") or container.get("lastState", {}).get("terminated")
    waiting = state.get("waiting", {})
    reason, text = waiting.get("reason", ""), waiting.get("message", "")
    if reason in _PULL:
        yield PodProblem(reason="ImagePullBackOff", message=f"{container.get('image', '')}: {text or reason}")
    elif reason in _CONFIG:
        yield PodProblem(reason="CreateContainerConfigError", message=f"{name}: {text or reason}")
    elif ended and ended.get("exitCode") and not container.get("ready"):
        yield from _ended(container, ended, is_init=is_init)


def _ended(container: Mapping[str, Any], ended: Mapping[str, Any], *, is_init: bool) -> Iterator[PodProblem]:
    name, last = container["name"], _last_words(ended.get("message", ""))
    message = f"{name} exited with status {ended['exitCode']}{last}"
    if ended.get("reason") == "OOMKilled":
        yield PodProblem(reason="OOMKilled", message=f"{name} exceeded its memory limit{last}")
    elif is_init and name in _MODEL:
        yield PodProblem(reason="ModelDownloadFailed", message=message)
    elif container.get("restartCount", 0) >= _RESTARTED or "terminated" in container.get("state", {}):
        times = f", {container['restartCount']} restarts" if container.get("restartCount") else ""
        yield PodProblem(reason="CrashLoopBackOff", message=f"{message}{times}")


def _last_words(message: str) -> str:
    """The last line of a termination message; of our own JSON logs, only the message."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    logged = _LOGGED.search(lines[-1])
    try:
        return f": {json.loads(logged[1]) if logged else lines[-1]}"[:500]
    except ValueError:  # it only resembles one of our log lines
        return f": {lines[-1]}"[:500]


def _result(status: Mapping[str, Any]) -> str:
    for container in status.get("containerStatuses", ())[:1]:
        ended = container.get("state", {}).get("terminated", {})
        if ended and ended.get("exitCode") == 0:
            return str(ended.get("message", ""))
    return ""
