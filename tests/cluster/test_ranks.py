"""A trainer of two ranks in two pods on a real node, with gloo on CPUs: it learns, loses a pod and a process, and goes on."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster import tours
from tests.cluster.access import Api
from tests.cluster.tours import Tour, traffic
from tests.support.wait import wait_until

pytestmark = [pytest.mark.timeout(2400), pytest.mark.lasts(300)]

_PODS = ("tour-trainer-0", "tour-trainer-1")

_KILL_A_RANK = """
import os, pathlib, signal
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        variables = (process / "environ").read_bytes().split(bytes(1))
    except OSError:
        continue
    if b"LOCAL_RANK=0" in variables:
        os.kill(int(process.name), signal.SIGKILL)
        print("killed")
"""
"""A program for the trainer's container, which has no ps."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tour]:
    """The tour's resource with two ranks, and versions that serve at once: canaries are the tour's own test."""
    if why := tours.obstacle():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("ranks")
    spec: dict[str, dict[str, Any]] = {
        "trainer": {"nodes": 2},
        "serving": {"replicas": 1},
        "rollout": {"strategy": "Immediate"},
    }
    with tours.tour(folder, num_volumes=4, **spec) as running:
        yield running


def test_two_ranks_learn_lose_a_pod_and_a_process_and_publish_again(ranks: Tour) -> None:
    ranks.run("Install")
    ranks.shell("kubectl apply -f examples/tour.yaml")
    ranks.shell("kubectl wait asp/tour --for=condition=Ready --timeout=10m")
    ranks.shell("kubectl wait asp/tour --for=condition=TrainerReady --timeout=10m")
    with ranks.node.api() as api:
        with traffic(ranks, api):
            ranks.shell("kubectl wait dver/tour-v1 --for=create --timeout=10m")
        before = _uids(api)
        version = _newest(api)
        ranks.shell("kubectl delete pod tour-trainer-1")
        ranks.shell("kubectl wait asp/tour --for=condition=TrainerReady --timeout=10m")
        assert _uids(api)["tour-trainer-1"] != before["tour-trainer-1"]
        with traffic(ranks, api, "another question"):
            _wait_for_a_version_after(ranks, api, version)

        version, restarts = _newest(api), _restarts(api)
        assert ranks.shell(f"kubectl exec tour-trainer-1 -- python -c '{_KILL_A_RANK}'") == "killed\n"
        with traffic(ranks, api, "a third thing"):
            _wait_for_a_version_after(ranks, api, version)
        assert _restarts(api) == restarts, "torchrun restarts ranks within their pods"
    assert {f"pod/{name}" for name in _PODS} | {f"persistentvolumeclaim/data-{name}" for name in _PODS} <= _left(ranks)
    ranks.shell("kubectl delete asp/tour --wait")
    wait_until(lambda: not _left(ranks), what="the end of its pods and volumes")


def _wait_for_a_version_after(ranks: Tour, api: Api, version: int) -> None:
    since = time.monotonic()
    try:
        wait_until(lambda: _newest(api) > version, timeout_s=600, what="another version")
    except TimeoutError:
        raise AssertionError(f"no version after {time.monotonic() - since:.0f} s:\n{ranks.state()}") from None


def _newest(api: Api) -> int:
    found = api.get("/apis/updraft.dev/v1alpha1/namespaces/default/draftversions")["items"]
    return max(int(each["spec"]["version"]) for each in found)


def _uids(api: Api) -> dict[str, str]:
    return {name: api.get(f"/api/v1/namespaces/default/pods/{name}")["metadata"]["uid"] for name in _PODS}


def _restarts(api: Api) -> dict[str, int]:
    """Of the trainer's containers."""
    pods = {name: api.get(f"/api/v1/namespaces/default/pods/{name}") for name in _PODS}
    return {name: pod["status"]["containerStatuses"][0]["restartCount"] for name, pod in pods.items()}


def _left(ranks: Tour) -> set[str]:
    """Pods and volumes of the trainer."""
    selector = "updraft.dev/speculator=tour,app.kubernetes.io/component=trainer"
    return set(ranks.shell(f"kubectl get pods,pvc -l {selector} -o name").split())
