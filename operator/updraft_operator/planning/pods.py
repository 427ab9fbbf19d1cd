"""What a pod's status says, in few words: whether it is ready, and if not, why, as a reason that a person can act on.

From the pod's own status alone. Refused: reading Events, which are deleted after an hour and are for people.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from updraft_operator.api import names

_PULL = {"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
_MODEL = "model"
"""The init container that downloads the target."""

_LOGGED = re.compile(r'"message": ("(?:[^"\\]|\\.)*")')
"""In a line of JSON, which may be cut: a container leaves no more than 2 kB as its last word."""

_RESTARTED = 1
"""Restarts from which a container that died is said to crash again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodProblem:
    """Why a pod is not ready."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PodState:
    """The part of a pod that decisions are made on."""

    name: str
    part: str
    is_ready: bool
    is_ending: bool
    problem: PodProblem | None
    """None also while it just starts."""
    result: str = ""
    """What its first container left as its last word, once that has ended well."""

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> "PodState":
        """Read it from a pod."""
        metadata, status = body["metadata"], body.get("status", {})
        conditions = {entry["type"]: entry for entry in status.get("conditions", ())}
        return cls(
            name=metadata["name"],
            part=metadata.get("labels", {}).get(names.COMPONENT, ""),
            is_ready=conditions.get("Ready", {}).get("status") == "True",
            is_ending="deletionTimestamp" in metadata,
            problem=next(_troubles(status, conditions), None),
            result=_result(status),
        )


def worst(pods: Iterable[PodState]) -> tuple[PodState, PodProblem] | None:
    """The first trouble by the order of names, so that the same pods always give the same words."""
    for pod in sorted(pods, key=lambda pod: pod.name):
        if pod.problem is not None and not pod.is_ending:
            return pod, pod.problem
    return None


def _troubles(status: Mapping[str, Any], conditions: Mapping[str, Any]) -> Iterator[PodProblem]:
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        yield _unscheduled(scheduled.get("message", ""))
    for container in status.get("initContainerStatuses", ()):
        yield from _of_container(container, is_init=True)
    for container in status.get("containerStatuses", ()):
        yield from _of_container(container, is_init=False)
    if status.get("phase") == "Failed" and status.get("reason"):  # evicted, preempted, node lost
        yield PodProblem(
            reason="CrashLoopBackOff", message=f"{status['reason']}: {status.get('message', '')}".strip(": ")
        )


def _unscheduled(message: str) -> PodProblem:
    is_gpu = "Insufficient" in message and "gpu" in message.lower()
    return PodProblem(
        reason="InsufficientGPU" if is_gpu else "Unschedulable", message=message or "no node takes it yet"
    )


def _of_container(container: Mapping[str, Any], *, is_init: bool) -> Iterator[PodProblem]:
    state, name = container.get("state", {}), container["name"]
    waiting, ended = (
        state.get("waiting", {}),
        state.get("terminated") or container.get("lastState", {}).get("terminated"),
    )
    reason, text = waiting.get("reason", ""), waiting.get("message", "")
    if reason in _PULL:
        yield PodProblem(reason="ImagePullBackOff", message=f"{container.get('image', '')}: {text or reason}")
    elif reason in _CONFIG:
        yield PodProblem(reason="CreateContainerConfigError", message=f"{name}: {text or reason}")
    elif ended and ended.get("exitCode") and not container.get("ready"):
        yield from _ended(container, ended, is_init=is_init)


def _ended(container: Mapping[str, Any], ended: Mapping[str, Any], *, is_init: bool) -> Iterator[PodProblem]:
    name, last = container["name"], _last_words(ended.get("message", ""))
    message = f"{name} ended with status {ended['exitCode']}{last}"
    if ended.get("reason") == "OOMKilled":
        yield PodProblem(reason="OOMKilled", message=f"{name} took more memory than its limit{last}")
    elif is_init and name == _MODEL:
        yield PodProblem(reason="ModelDownloadFailed", message=message)
    elif container.get("restartCount", 0) >= _RESTARTED or "terminated" in container.get("state", {}):
        times = f", {container['restartCount']} restarts" if container.get("restartCount") else ""
        yield PodProblem(reason="CrashLoopBackOff", message=f"{message}{times}")


def _last_words(message: str) -> str:
    """The last line; of one of our own logs what it says, without time, place and traceback."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    logged = _LOGGED.search(lines[-1])
    try:
        return f": {json.loads(logged[1]) if logged else lines[-1]}"[:500]
    except ValueError:  # it only looks like one of ours
        return f": {lines[-1]}"[:500]


def _result(status: Mapping[str, Any]) -> str:
    for container in status.get("containerStatuses", ())[:1]:
        ended = container.get("state", {}).get("terminated", {})
        if ended and ended.get("exitCode") == 0:
            return str(ended.get("message", ""))
    return ""
