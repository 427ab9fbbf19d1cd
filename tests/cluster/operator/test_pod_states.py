"""What is wrong with a pod becomes a reason of the resource with words to act on, is told once, and goes again."""

import logging
from typing import Any

import pytest
from tests.cluster.access import Json
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import Subject, running
from tests.support.wait import wait_until

from updraft_chassis.logs import JsonFormatter
from updraft_operator.api import names

NO_GPU = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. preemption: 0/2 nodes are available."
NO_NODE = "0/2 nodes are available: 2 node(s) had untolerated taint {reserved: }."
NO_IMAGE = 'Back-off pulling image "updraft-inference:dev"'
NO_KEY = 'couldn\'t find key "url" in Secret demo/redis'
TRACEBACK = "Traceback (most recent call last):\n  File 'x.py', line 1\nOSError: the hub does not answer"


def _log_line(message: str) -> str:
    """As a part of ours ends: its last log line is what Kubernetes takes for its last word."""
    record = logging.makeLogRecord({"msg": message, "levelname": "ERROR", "name": "updraft", "trace_id": "7f"})
    return f"starting\n{JsonFormatter('inference').format(record)}\n"


def _unscheduled(message: str) -> Json:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"phase": "Pending", "conditions": [condition]}


def _not_ready(phase: str, **more: Any) -> Json:
    return {"phase": phase, "conditions": [{"type": "Ready", "status": "False"}], **more}


def _container(name: str = "inference", **more: Any) -> Json:
    described = {"name": name, "image": f"updraft-{name}:dev", "imageID": "", "ready": False, "restartCount": 0}
    return {**described, **more}


def _waits(reason: str, message: str, **more: Any) -> Json:
    waiting = _container(state={"waiting": {"reason": reason, "message": message}}, **more)
    return _not_ready("Pending", containerStatuses=[waiting])


def _crashes(message: str, *, code: int = 1, reason: str = "Error", restarts: int = 2, name: str = "inference") -> Json:
    """Between two tries."""
    ended = {"terminated": {"exitCode": code, "reason": reason, "message": message}}
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 20s restarting failed container"}}
    crashed = _container(name, state=waiting, lastState=ended, restartCount=restarts)
    return _not_ready("Running", containerStatuses=[crashed])


def _download_fails(message: str) -> Json:
    crashed = _crashes(message, name="model", restarts=0)["containerStatuses"]
    waiting = _container(state={"waiting": {"reason": "PodInitializing"}})
    return _not_ready("Pending", initContainerStatuses=crashed, containerStatuses=[waiting])


def _pods(subject: Subject, part: str, number: int = 1) -> list[Json]:
    wait_until(lambda: len(subject.pods(part)) == number, what=f"{number} pods of {part}")
    return sorted(subject.pods(part), key=lambda each: str(each["metadata"]["name"]))


def _pod(subject: Subject, part: str = names.SERVING) -> str:
    (pod,) = _pods(subject, part)
    return str(pod["metadata"]["name"])


STATES = [
    pytest.param(_unscheduled(NO_GPU), "InsufficientGPU", NO_GPU, id="no GPU is free"),
    pytest.param(_unscheduled(NO_NODE), "Unschedulable", NO_NODE, id="no node takes it"),
    pytest.param(
        _waits("ImagePullBackOff", NO_IMAGE), "ImagePullBackOff", f"updraft-inference:dev: {NO_IMAGE}", id="no image"
    ),
    pytest.param(
        _crashes("", code=137, reason="OOMKilled"),
        "OOMKilled",
        "inference exceeded its memory limit",
        id="too little memory",
    ),
    pytest.param(
        _crashes(_log_line("/models/target has no config.json: mount the model there")),
        "CrashLoopBackOff",
        "inference exited with status 1: /models/target has no config.json: mount the model there, 2 restarts",
        id="it crashes and logs why",
    ),
    pytest.param(
        _crashes(TRACEBACK),
        "CrashLoopBackOff",
        "inference exited with status 1: OSError: the hub does not answer, 2 restarts",
        id="it crashes with a traceback",
    ),
    pytest.param(
        _download_fails(_log_line("hf://org/model is not there")),
        "ModelDownloadFailed",
        "model exited with status 1: hf://org/model is not there",
        id="the model cannot be downloaded",
    ),
    pytest.param(
        _waits("CreateContainerConfigError", NO_KEY),
        "CreateContainerConfigError",
        f"inference: {NO_KEY}",
        id="a Secret lacks an entry",
    ),
]


@pytest.mark.parametrize(("status", "reason", "said"), STATES)
def test_what_is_wrong_with_a_pod_is_told_and_goes_with_it(
    operator: Running, subject: Subject, status: Json, reason: str, said: str
) -> None:
    subject.create(targetModel={"uri": "hf://org/model"})
    pod = _pod(subject)

    subject.set_pod(pod, status)

    told = subject.wait_for("Available", "False", reason)
    assert told == f"0 of 1 pods are ready; {pod}: {said}"
    subject.wait_for("Ready", "False", reason)
    assert subject.conditions()["Ready"]["message"] == told
    serving = subject.get()["status"]["serving"]
    assert (serving["readyReplicas"], serving["failedReplicas"]) == (0, 1)

    subject.set_pod(pod, {"initContainerStatuses": None})  # what is not said again stays, and a kubelet says it again
    subject.run(names.SERVING)

    assert subject.wait_for("Available", "True", "PodsReady") == "1 of 1 pods are ready"
    serving = subject.get()["status"]["serving"]
    assert (serving["readyReplicas"], serving["failedReplicas"]) == (1, 0)


def test_a_state_is_told_once_however_often_it_is_looked_at(operator: Running, subject: Subject) -> None:
    def told(kind: str) -> list[str]:
        return sorted(reason for reason, message in subject.events() if message.startswith(f"{kind} is "))

    subject.create()
    pod = _pod(subject)
    subject.wait_for("Available", "False", "ModelLoading")
    assert told("Available") == [], "the first conditions of a resource are no news"
    for restarts in (2, 3, 4):  # its words change, its state does not
        subject.set_pod(pod, _crashes("no config.json", restarts=restarts))
        wait_until(
            lambda restarts=restarts: f"{restarts} restarts" in subject.conditions()["Available"]["message"],  # type: ignore[misc] # a default
            what=f"{restarts} restarts",
        )
    operator.wait_for_listings(3)
    assert told("Available") == ["CrashLoopBackOff"]

    subject.set_pod(pod, running(_pods(subject, names.SERVING)[0]))
    subject.wait_for("Available", "True", "PodsReady")
    wait_until(lambda: told("Available") == ["CrashLoopBackOff", "PodsReady"], what="the news of the recovery")
    subject.set_pod(pod, _crashes("no config.json", restarts=5))
    subject.wait_for("Available", "False", "CrashLoopBackOff")

    crashed = ["CrashLoopBackOff", "CrashLoopBackOff", "PodsReady"]
    wait_until(lambda: told("Available") == crashed, what="the news of the second crash")
    crashes = [each for each in subject.all_of("Event") if each["message"].startswith("Available is False")]
    assert {(each["type"], each["involvedObject"]["uid"]) for each in crashes} == {
        ("Warning", subject.get()["metadata"]["uid"])
    }


def test_one_pod_of_three_that_crashes_is_counted_and_the_others_serve(operator: Running, subject: Subject) -> None:
    subject.create(serving={"replicas": 3})
    first, *others = _pods(subject, names.SERVING, 3)
    for each in others:
        subject.set_pod(each["metadata"]["name"], running(each))
    subject.wait_for("Available", "True", "PodsReady")

    subject.set_pod(first["metadata"]["name"], _crashes("broken"))

    wait_until(lambda: subject.get()["status"]["serving"].get("failedReplicas") == 1, what="the pod that crashes")
    assert subject.wait_for("Available", "True", "PodsReady") == "2 of 3 pods are ready"


def test_a_registry_that_crashes_takes_nothing_from_clients(operator: Running, subject: Subject) -> None:
    subject.create()
    subject.run(names.SERVING)
    subject.wait_for("Available", "True", "PodsReady")
    pod = _pod(subject, names.REGISTRY)

    subject.set_pod(pod, _crashes(_log_line("/data cannot be written: check fsGroup"), name="registry"))

    told = subject.wait_for("RegistryReady", "False", "CrashLoopBackOff")
    assert told == f"{pod}: registry exited with status 1: /data cannot be written: check fsGroup, 2 restarts"
    assert subject.condition("Ready") == ("True", "Ready")


def test_a_trainer_that_crashes_stops_learning_and_no_serving(operator: Running, subject: Subject) -> None:
    subject.create()
    subject.run(names.SERVING)
    subject.wait_for("Available", "True", "PodsReady")
    pod = _pod(subject, names.TRAINER)

    subject.set_pod(pod, _crashes("", code=137, reason="OOMKilled", name="trainer"))

    told = subject.wait_for("TrainerReady", "False", "OOMKilled")
    assert told == f"{pod}: trainer exceeded its memory limit"
    assert subject.wait_for("Adapting", "False", "TrainerNotReady") == told
    assert subject.condition("Available") == ("True", "PodsReady")
    assert subject.get()["status"]["trainer"]["state"] == "Failing"
