"""Another operator restarts the pods of one resource after the other, and stops at one that does not come back."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
from tests.cluster.access import Api, ApiError, Json, audited
from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator.accounts import Account, account
from tests.cluster.operator.subject import Subject, running
from tests.support.operator import OperatorProcess
from tests.support.wait import wait_until

from updraft_operator.api import names

pytestmark = pytest.mark.lasts(120)

NUM_RESOURCES = 4
BROKEN = "broken"
"""Images with this name cannot be pulled."""


@dataclass
class Kubelet:
    """Lets pods of a namespace be ready, and remembers when."""

    cluster: ControlPlane
    namespace: str
    ready: dict[tuple[str, str], str] = field(default_factory=dict)
    """By resource and inference image, when the last of its pods became ready."""

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self.cluster.api() as api:
            subject = Subject(api, self.namespace, "none")
            while not self._stop.wait(0.2):
                for pod in subject.all_of("Pod", **{names.MANAGED_BY: names.MANAGER}):
                    self._tell(subject, pod)

    def _tell(self, subject: Subject, pod: Json) -> None:
        image, labels = pod["spec"]["containers"][0]["image"], pod["metadata"]["labels"]
        if "deletionTimestamp" in pod["metadata"] or pod.get("status", {}).get("phase") != "Pending":
            return
        try:
            if BROKEN in image:
                waiting = {"waiting": {"reason": "ImagePullBackOff", "message": f"no {image}"}}
                state = {
                    "name": "x",
                    "image": image,
                    "imageID": "",
                    "ready": False,
                    "restartCount": 0,
                    "state": waiting,
                }
                subject.set_pod(pod["metadata"]["name"], {"containerStatuses": [state]})
                return
            if labels[names.COMPONENT] == names.SERVING:
                self.ready[labels[names.SPECULATOR], image] = datetime.now(UTC).isoformat()
            subject.set_pod(pod["metadata"]["name"], running(pod))
        except ApiError as error:
            if error.code not in (404, 409):
                raise

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def kubelet(kubernetes: ControlPlane, namespace: str) -> Iterator[Kubelet]:
    kubelet = Kubelet(kubernetes, namespace)
    yield kubelet
    kubelet.stop()


@dataclass(frozen=True)
class Operators:
    """Operators of several releases, one after the other."""

    who: Account
    folder: Path
    namespace: str

    @contextmanager
    def release(self, image: str, **more: object) -> Iterator[OperatorProcess]:
        """One that makes the pods of all parts with images of this tag."""
        images = {f"{part}_image": f"{part}:{image}" for part in ("inference", "trainer", "registry")}
        settings = {
            "namespace": self.namespace,
            "watch_namespaces": self.namespace,
            "lease_seconds": 3,
            **images,
            **more,
        }
        log = self.folder / f"{image}-{len(list(self.folder.iterdir()))}.log"
        with OperatorProcess(self.who.kubeconfig, log, **settings) as process:
            process.wait_until_ready()
            yield process


@pytest.fixture
def operators(kubernetes: ControlPlane, api: Api, namespace: str, tmp_path: Path) -> Operators:
    who = account(kubernetes, api, tmp_path, namespace, "upgraded", watched=[namespace])
    return Operators(who, tmp_path, namespace)


@pytest.fixture
def fleet(api: Api, namespace: str, kubelet: Kubelet, operators: Operators) -> list[Subject]:
    """Resources that serve, made by the first release."""
    subjects = [Subject(api, namespace, f"chat-{number}") for number in range(NUM_RESOURCES)]
    with operators.release("1"):
        for subject in subjects:
            subject.create(serving={"replicas": 2})
        for subject in subjects:
            subject.wait_for("RuntimeUpToDate", "True", "UpToDate")
            subject.wait_for("FullyScaled", "True", "PodsReady")
            wait_until(lambda subject=subject: _registry_runs(subject), what="registries")  # type: ignore[misc] # a default
    return subjects


def _registry_runs(subject: Subject) -> bool:
    return bool(subject.get("StatefulSet", f"{subject.name}-registry")["status"].get("readyReplicas"))


def _image(subject: Subject) -> str:
    template = subject.get("Deployment", f"{subject.name}-serving")["spec"]["template"]
    return str(template["spec"]["containers"][0]["image"])


def _changed(cluster: ControlPlane, subjects: list[Subject], since: str) -> dict[str, str]:
    """When each Deployment of inference pods was first applied since then."""
    ends, first = {f"{subject.name}-{names.SERVING}": subject.name for subject in subjects}, dict[str, str]()
    for entry in audited(cluster.audit_log):
        is_apply = (
            entry.resource == "deployments" and entry.verb == "patch" and entry.agent.startswith("updraft-operator")
        )
        if is_apply and entry.time > since and entry.name in ends and entry.namespace == subjects[0].namespace:
            first.setdefault(ends[entry.name], entry.time)
    return first


def _assert_one_by_one(changed: dict[str, str], kubelet: Kubelet) -> None:
    order = sorted(changed, key=lambda name: changed[name])
    assert len(order) == NUM_RESOURCES
    for before, after in pairwise(order):
        back = datetime.fromisoformat(kubelet.ready[before, "inference:2"])
        assert datetime.fromisoformat(changed[after]) > back, f"{after} began before {before} was back"


def test_a_newer_operator_restarts_one_resource_after_the_other(
    kubernetes: ControlPlane, fleet: list[Subject], kubelet: Kubelet, operators: Operators
) -> None:
    since = datetime.now(UTC).isoformat()
    with operators.release("2"):
        for subject in fleet:
            wait_until(lambda subject=subject: _image(subject) == "inference:2", what="the update")  # type: ignore[misc] # a default
            subject.wait_for("RuntimeUpToDate", "True", "UpToDate")
    _assert_one_by_one(_changed(kubernetes, fleet, since), kubelet)
    for subject in fleet:
        assert subject.get()["status"]["runtime"]["current"] == subject.get()["status"]["runtime"]["available"]


def test_it_stops_at_the_first_that_does_not_come_back_and_a_rollback_heals_it(
    fleet: list[Subject], operators: Operators
) -> None:
    with operators.release(BROKEN) as process:
        failed = fleet[0]
        message = failed.wait_for("RuntimeUpToDate", "False", "UpdateFailed")
        assert f":{BROKEN}" in message, "the first pod of any part that cannot start"
        wait_until(lambda: process.metric('updraft_operator_upgrades{stage="failed"}') == 1, what="the metric")
        wait_until(lambda: "UpdateFailed" in {reason for reason, _ in failed.events()}, what="the Event")
        for subject in fleet[1:]:
            subject.wait_for("RuntimeUpToDate", "False", "WaitingForTurn")
            assert _image(subject) == "inference:1"
        assert failed.condition("Available") == ("True", "PodsReady"), "a rolling update keeps the pods that serve"
        process.send(signal.SIGKILL)
    with operators.release("1"):
        for subject in fleet:
            subject.wait_for("RuntimeUpToDate", "True", "UpToDate")
            assert _image(subject) == "inference:1"
            wait_until(lambda subject=subject: _registry_runs(subject), what="registries")  # type: ignore[misc] # a default


def test_operators_that_are_killed_within_an_upgrade_complete_it_one_by_one(
    kubernetes: ControlPlane, fleet: list[Subject], kubelet: Kubelet, operators: Operators
) -> None:
    since = datetime.now(UTC).isoformat()
    for number in range(NUM_RESOURCES):
        with operators.release("2") as process:
            wait_until(lambda number=number: len(_changed(kubernetes, fleet, since)) > number, what="an update")  # type: ignore[misc] # a default
            process.send(signal.SIGKILL)
    with operators.release("2"):
        for subject in fleet:
            subject.wait_for("RuntimeUpToDate", "True", "UpToDate")
            assert _image(subject) == "inference:2"
    _assert_one_by_one(_changed(kubernetes, fleet, since), kubelet)


def test_a_change_of_the_spec_does_not_wait_and_a_policy_does(fleet: list[Subject], operators: Operators) -> None:
    first, second, *_ = fleet
    second.change(updatePolicy={"mode": "OnSpecChange"})
    with operators.release("2", upgrades_max_concurrent=0):
        first.change(serving={"maxRunningRequests": 9})
        wait_until(lambda: _image(first) == "inference:2", what="the change")
        second.wait_for("RuntimeUpToDate", "False", "WaitingForSpecChange")
        second.change(serving={"replicas": 3})
        wait_until(
            lambda: second.get("Deployment", f"{second.name}-serving")["spec"]["replicas"] == 3, what="the replicas"
        )
        assert _image(second) == "inference:1"


def test_the_drain_of_a_node_respects_the_budget(operators: Operators, subject: Subject, kubelet: Kubelet) -> None:
    """Each pod is evicted as `kubectl drain` does it. The budget is that of 100 pods: 10 %."""
    with operators.release("1"):
        subject.create(serving={"replicas": 100})
        subject.wait_for("FullyScaled", "True", "PodsReady", timeout_s=180)
        _wait_for_budget(subject, 10)
        kubelet.stop()
        first, second, *others = (pod["metadata"]["name"] for pod in subject.pods(names.SERVING))
        assert [_evict(subject, pod) for pod in (first, second)] == [201, 201]
        wait_until(
            lambda: subject.conditions()["Available"]["message"] == "98 of 100 pods are ready", what="the missing pods"
        )
        assert subject.condition("FullyScaled") == ("False", "PodsMissing")
        assert subject.condition("Available") == ("True", "PodsReady")
        codes = [_evict(subject, pod) for pod in others]
        assert sorted(codes) == [*[201] * 8, *[429] * 90]
        ready = [pod for pod in subject.pods(names.SERVING) if pod.get("status", {}).get("phase") == "Running"]
        assert len(ready) == 90
        assert subject.condition("Available") == ("True", "PodsReady")
        subject.run(names.SERVING, 100)
        _wait_for_budget(subject, 10)


def _wait_for_budget(subject: Subject, num_pods: int) -> None:
    def is_so() -> bool:
        status = subject.get("PodDisruptionBudget", f"{subject.name}-serving")["status"]
        return bool(status.get("disruptionsAllowed") == num_pods)

    wait_until(is_so, what=f"a budget of {num_pods} pods")


def _evict(subject: Subject, pod: str) -> int:
    """The answer to an eviction."""
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
    try:
        subject.api.create(subject.path("Pod", pod, "eviction"), body)
    except ApiError as error:
        return error.code
    return 201
