"""KEDA's own controller, and the autoscaler that it makes, scale a resource with the ScaledObject of docs/operator.md."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.chart.go_program import KEDA
from tests.cluster.access import Json, succeeds
from tests.cluster.control_plane import ControlPlane
from tests.cluster.crds import DEFINITIONS
from tests.cluster.daemon import Daemon
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import Subject
from tests.cluster.programs import CHECKOUT
from tests.support.wait import wait_until

from updraft_operator.api import names

_DEFINITION = Path(__file__).parent.parent / "keda" / "scaledobjects.yaml"
_API = "/apis/keda.sh/v1alpha1/namespaces"
# But for one minute of a leap day, and of the year's last.
_NEVER = {"timezone": "UTC", "start": "0 0 29 2 *", "end": "1 0 29 2 *", "desiredReplicas": "4"}
_ALWAYS = {"timezone": "UTC", "start": "0 0 1 1 *", "end": "59 23 31 12 *", "desiredReplicas": "4"}


@pytest.fixture(scope="module", autouse=True)
def keda(kubernetes: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if not KEDA.binary.exists():
        pytest.skip(f"KEDA: not built; run `python -m tests.chart.go_program` (once; {KEDA.lasts})")
    with kubernetes.api() as api:
        api.create(DEFINITIONS, yaml.safe_load(_DEFINITION.read_text()))
        wait_until(lambda: succeeds(lambda: api.get(f"{_API}/default/scaledobjects")), what="an answer about them")
        controller = Daemon("keda", [KEDA.binary, kubernetes.kubeconfig], tmp_path_factory.mktemp("keda"))
        try:
            yield controller
            assert controller.process.poll() is None, controller.tail()
        finally:
            controller.kill()
            api.delete(f"{DEFINITIONS}/scaledobjects.keda.sh")


class ScaledObject:
    """The one of the page, about a speculator, with a trigger that needs no Prometheus."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._path = f"{_API}/{subject.namespace}/scaledobjects"

    @contextmanager
    def created(self, **spec: Any) -> Iterator[None]:
        """Delete it at the end, also after a failure: KEDA, which ends with the module, has a finalizer in it."""
        content = _of_the_page()
        content["metadata"]["name"] = self._subject.name
        content["spec"]["scaleTargetRef"]["name"] = self._subject.name
        content["spec"] |= {"pollingInterval": 1, "cooldownPeriod": 1, **spec}
        self._subject.api.create(self._path, content)
        try:
            yield
        finally:
            self._delete()

    def change(self, **spec: Any) -> None:
        self._subject.api.patch(f"{self._path}/{self._subject.name}", {"spec": spec})

    def _delete(self) -> None:
        """Return when it has gone, and the HorizontalPodAutoscaler with it."""
        self._subject.api.delete(f"{self._path}/{self._subject.name}")
        wait_until(lambda: not self._subject.api.exists(f"{self._path}/{self._subject.name}"), what="its end")
        wait_until(lambda: not self.autoscalers(), what="the end of the HorizontalPodAutoscaler")

    def autoscalers(self) -> list[Json]:
        path = f"/apis/autoscaling/v2/namespaces/{self._subject.namespace}/horizontalpodautoscalers"
        return list(self._subject.api.get(path)["items"])


def _of_the_page() -> Json:
    blocks = re.findall(r"```yaml\n(.*?)```", (CHECKOUT / "docs" / "operator.md").read_text(), flags=re.DOTALL)
    (found,) = [content for content in map(yaml.safe_load, blocks) if content.get("kind") == "ScaledObject"]
    return dict(found)


def _cron(window: dict[str, str]) -> list[Json]:
    return [{"type": "cron", "metadata": window}]


def _replicas(subject: Subject) -> tuple[int, int]:
    """Of the resource, and of its Deployment."""
    deployment = subject.get("Deployment", f"{subject.name}-serving")
    return subject.get()["spec"]["serving"]["replicas"], deployment["spec"]["replicas"]


def _wait_for(subject: Subject, number: int, keda: Daemon) -> None:
    keda.wait_until(lambda: _replicas(subject) == (number, number), what=f"{number} pods")


def test_keda_and_its_autoscaler_keep_a_resource_within_bounds_and_leave_their_last_number(
    operator: Running, subject: Subject, keda: Daemon
) -> None:
    subject.create()
    subject.wait_until_built()
    scaled = ScaledObject(subject)

    with scaled.created(minReplicaCount=2, maxReplicaCount=4, triggers=_cron(_NEVER)):
        _wait_for(subject, 2, keda)
        operator.cluster.kubectl("scale", f"asp/{subject.name}", "--replicas=6", "-n", subject.namespace)
        _wait_for(subject, 4, keda)
        scaled.change(idleReplicaCount=0)
        _wait_for(subject, 0, keda)
        scaled.change(triggers=_cron(_ALWAYS))
        _wait_for(subject, 2, keda)
    operator.wait_for_listings(1)
    assert _replicas(subject) == (2, 2)
    subject.change(serving={"replicas": 3})
    _wait_for(subject, 3, keda)


def test_the_object_of_the_page_becomes_an_autoscaler_of_the_resource(
    operator: Running, subject: Subject, keda: Daemon
) -> None:
    subject.create()
    subject.wait_until_built()
    scaled = ScaledObject(subject)

    with scaled.created():
        keda.wait_until(lambda: bool(scaled.autoscalers()), what="a HorizontalPodAutoscaler")
        (autoscaler,) = scaled.autoscalers()
    spec, target = autoscaler["spec"], {"apiVersion": names.API_VERSION, "kind": "AdaptiveSpeculator"}
    assert spec["scaleTargetRef"] == {**target, "name": subject.name}
    assert (spec["minReplicas"], spec["maxReplicas"]) == (1, 8)
    (metric,) = spec["metrics"]
    assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "6"}
    assert metric["external"]["metric"]["name"] == "s0-prometheus"
