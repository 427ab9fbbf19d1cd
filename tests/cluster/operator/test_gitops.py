"""What waits for a resource: the real Helm 4, whose chart has an AdaptiveSpeculator, and a status of something older."""

from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from kubernetes.aio import client, config
from tests.chart.chart import helm
from tests.cluster import programs
from tests.cluster.access import ApiError
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import MODEL, Subject
from tests.support.wait import wait_until

from updraft_chassis.errors import UpdraftError
from updraft_operator.api import names
from updraft_operator.watching.cluster import RESOURCES
from updraft_operator.watching.kubernetes_cluster import TIMEOUT_S, KubernetesCluster

Release = Future[CompletedProcess[str]]


@pytest.fixture(scope="module")
def has_helm() -> None:
    if programs.find("helm") is None:
        pytest.skip("helm: not built; run `make cluster-build`")


def _released(operator: Running, subject: Subject, chart: Path, pool: ThreadPoolExecutor, **spec: Any) -> Release:
    """`helm upgrade --install --wait` of a chart with nothing but this resource, under way."""
    (chart / "templates").mkdir(parents=True, exist_ok=True)
    (chart / "Chart.yaml").write_text(yaml.safe_dump({"apiVersion": "v2", "name": "chat", "version": "1.0.0"}))
    content = {
        "apiVersion": names.API_VERSION,
        "kind": "AdaptiveSpeculator",
        "metadata": {"name": subject.name},
        "spec": {"targetModel": {"uri": MODEL}, **spec},
    }
    (chart / "templates" / "speculator.yaml").write_text(yaml.safe_dump(content))
    words = (
        "upgrade",
        "--install",
        subject.name,
        str(chart),
        "--namespace",
        subject.namespace,
        "--wait",
        "--timeout",
        "4m",
    )
    return pool.submit(helm, *words, kubeconfig=operator.cluster.kubeconfig)


@pytest.mark.usefixtures("has_helm")
def test_helm_waits_until_pods_serve_and_again_until_a_change_is_rolled_out(
    operator: Running, subject: Subject, tmp_path: Path
) -> None:
    with ThreadPoolExecutor() as pool:
        first = _released(operator, subject, tmp_path, pool)
        subject.wait_until_built()
        subject.wait_for("Ready", "False", "ModelLoading")
        assert not first.done()
        subject.run(names.SERVING)
        assert first.result().returncode == 0, first.result().stderr

        second = _released(operator, subject, tmp_path, pool, serving={"maxRunningRequests": 4})
        wait_until(lambda: len(subject.pods(names.SERVING)) == 2, what="a pod of the new template")
        assert not second.done()
        wait_until(lambda: _runs(subject, second), what="the end of the rollout")
        assert second.result().returncode == 0, second.result().stderr


def _runs(subject: Subject, release: Release) -> bool:
    """Let all pods be ready until Helm has ended. One may be replaced in between."""
    try:
        subject.run(names.SERVING)
    except ApiError as error:
        if error.code != HTTPStatus.NOT_FOUND:
            raise
    return release.done()


@pytest.mark.usefixtures("has_helm")
def test_helm_does_not_wait_for_a_spec_that_cannot_work(operator: Running, subject: Subject, tmp_path: Path) -> None:
    wrong = {"podTemplate": {"spec": {"restartPolicy": "Sometimes"}}}
    with ThreadPoolExecutor() as pool:
        result = _released(operator, subject, tmp_path, pool, serving=wrong).result()
    assert result.returncode != 0
    assert "status: Failed" in result.stderr
    assert subject.condition("Stalled") == ("True", "InvalidPodTemplate")


@pytest.mark.usefixtures("has_helm")
def test_helm_does_not_wait_for_a_suspended_resource(operator: Running, subject: Subject, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        result = _released(operator, subject, tmp_path, pool, suspend=True).result()
    assert result.returncode == 0, result.stderr


async def test_a_deletion_does_not_reach_another_object_of_the_same_name(operator: Running, subject: Subject) -> None:
    name = f"{subject.name}-settings"
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}
    all_of = RESOURCES["ConfigMap"].path(subject.namespace)
    former = subject.api.create(all_of, body)["metadata"]["uid"]
    subject.api.delete(subject.path("ConfigMap", name))
    new = subject.api.create(all_of, body)["metadata"]["uid"]

    async with _connected(operator) as cluster:
        await cluster.delete("ConfigMap", subject.namespace, name, former)
        assert subject.get("ConfigMap", name)["metadata"]["uid"] == new
        await cluster.delete("ConfigMap", subject.namespace, name, new)
    assert not subject.exists("ConfigMap", name)


async def test_the_status_of_a_deleted_resource_is_not_written_to_its_successor(
    operator: Running, subject: Subject
) -> None:
    former = subject.create()["metadata"]["resourceVersion"]
    subject.delete()
    wait_until(lambda: not subject.exists(), what="the end of the first one")
    subject.create()
    subject.wait_until_built()
    before = subject.get()["status"]
    content = {
        "apiVersion": names.API_VERSION,
        "kind": "AdaptiveSpeculator",
        "metadata": {"name": subject.name, "namespace": subject.namespace, "resourceVersion": former},
        "status": {"versions": {"stable": 77}},
    }

    async with _connected(operator) as cluster:
        with pytest.raises(UpdraftError):
            await cluster.apply(content, is_status=True)

    assert subject.get()["status"].get("versions") == before.get("versions")


@asynccontextmanager
async def _connected(operator: Running) -> AsyncIterator[KubernetesCluster]:
    """The API server as the operator's own code speaks to it, with the rights of an administrator."""
    configuration = client.Configuration()
    await config.load_kube_config(str(operator.cluster.kubeconfig), client_configuration=configuration)
    async with client.ApiClient(configuration) as api:
        yield KubernetesCluster(api, lambda: None, lambda *_: None, TIMEOUT_S)
