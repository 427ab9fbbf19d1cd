"""What pods say of themselves becomes a reason and a message that a person can act on; an Event tells each change once."""

from collections.abc import Callable
from typing import Any

import pytest
from tests.cluster.access import Json
from tests.cluster.operator import requests
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import Subject
from tests.support.wait import wait_until

from updraft_operator.api import names

GPU = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available."
PULL = 'Back-off pulling image "mine:1": ErrImagePull: pull access denied'
WORDS = "Traceback (most recent call last):\n  File x\nRuntimeError: the model is not for this engine"


def container(pod: Json, *, is_init: bool = False, **state: Any) -> Json:
    """The status of its first (init) container."""
    spec = pod["spec"]["initContainers" if is_init else "containers"][0]
    told = {"name": spec["name"], "image": spec["image"], "imageID": "", "ready": False, "restartCount": 0, **state}
    return {"initContainerStatuses" if is_init else "containerStatuses": [told]}


def ended(code: int, *, reason: str = "Error", message: str = "") -> Json:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


def waiting(reason: str, message: str = "") -> Json:
    return {"waiting": {"reason": reason, "message": message}}


def unscheduled(pod: Json) -> Json:
    told = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": GPU}
    return {"phase": "Pending", "conditions": [told]}


def out_of_memory(pod: Json) -> Json:
    last = ended(137, reason="OOMKilled")
    return container(pod, restartCount=1, state=waiting("CrashLoopBackOff"), lastState=last)


def crashing(pod: Json) -> Json:
    return container(pod, restartCount=4, state=waiting("CrashLoopBackOff"), lastState=ended(1, message=WORDS))


def download(pod: Json) -> Json:
    message = "updraft: hf://org/model is gated: set HF_TOKEN"
    return container(pod, is_init=True, restartCount=1, state=ended(1, message=message))


TROUBLES: list[tuple[Callable[[Json], Json], str, str]] = [
    (unscheduled, "InsufficientGPU", "Insufficient nvidia.com/gpu"),
    (lambda pod: container(pod, state=waiting("ImagePullBackOff", PULL)), "ImagePullBackOff", "pull access denied"),
    (out_of_memory, "OOMKilled", "more memory than its limit"),
    (crashing, "CrashLoopBackOff", "the model is not for this engine, 4 restarts"),
    (download, "ModelDownloadFailed", "is gated: set HF_TOKEN"),
]


@pytest.fixture
def built(operator: Running, subject: Subject) -> Subject:
    """One whose pods are there, and have said nothing yet; its model is downloaded."""
    subject.create(targetModel={"uri": "hf://org/model"})
    subject.wait_until_built()
    wait_until(lambda: len(subject.pods(names.SERVING)) == 1, what="its pod")
    return subject


def test_every_trouble_of_a_pod_has_its_reason_and_one_event(operator: Running, built: Subject) -> None:
    (pod,) = built.pods(names.SERVING)
    name = pod["metadata"]["name"]
    for status, reason, words in TROUBLES:
        cleared = {"conditions": None, "containerStatuses": None, "initContainerStatuses": None}
        built.set_pod(name, {**cleared, **status(pod)})
        message = built.wait_for("ServingReady", "False", reason)
        assert message.startswith(f"0 of 1 pods are ready; {name}: ")
        assert words in message
        assert built.condition("Ready") == ("False", reason)

    built.run(names.SERVING)
    built.run(names.REGISTRY)
    assert built.wait_for("ServingReady", "True", "PodsReady") == "1 of 1 pods are ready"
    operator.wait_for_listings(1)

    told = [(reason, message) for reason, message in built.events() if message.startswith("ServingReady")]
    assert sorted(reason for reason, _ in told) == sorted([*(reason for _, reason, _ in TROUBLES), "PodsReady"])


def test_a_pod_that_says_the_same_again_causes_no_write(operator: Running, built: Subject) -> None:
    (pod,) = built.pods(names.SERVING)
    built.set_pod(pod["metadata"]["name"], crashing(pod))
    built.wait_for("ServingReady", "False", "CrashLoopBackOff")
    operator.wait_for_listings(1)
    since = requests.now()

    annotations = {"example.test/heartbeat": since}
    built.api.patch(built.path("Pod", pod["metadata"]["name"]), {"metadata": {"annotations": annotations}})
    operator.wait_for_listings(1)

    assert requests.writes(operator.cluster, operator.account.user, since, namespace=built.namespace) == []


def test_a_registry_and_a_trainer_in_trouble_are_told_apart(operator: Running, built: Subject) -> None:
    built.run(names.SERVING)
    for part in (names.REGISTRY, names.TRAINER):
        wait_until(lambda part=part: bool(built.pods(part)), what=f"a pod of {part}")  # type: ignore[misc] # a default
        (pod,) = built.pods(part)
        built.set_pod(pod["metadata"]["name"], container(pod, state=waiting("ImagePullBackOff", PULL)))

    built.wait_for("RegistryReady", "False", "ImagePullBackOff")
    built.wait_for("TrainerReady", "False", "ImagePullBackOff")
    assert built.condition("ServingReady") == ("True", "PodsReady")
    assert built.condition("Ready") == ("False", "ImagePullBackOff")
    assert built.get()["status"]["trainer"]["state"] == "Failing"
