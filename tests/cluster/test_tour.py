"""docs/tour.md, command by command, on a real node with our own images, under traffic from its first draft to its end."""

import json
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
from tests.browser.browser import Browser
from tests.cluster import somebodys_vllm, tours, updraft_images
from tests.cluster.access import Api, Json
from tests.cluster.chromium import chromium
from tests.cluster.somebodys_vllm import Vllm
from tests.cluster.tours import Tour, Traffic, section, traffic
from tests.support.wait import wait_until

from updraft_cli.backends.cluster import ClusterBackend
from updraft_cli.backends.cluster_client import KubeContext
from updraft_cli.backends.forwarded.backend import ForwardedBackend, forwarded
from updraft_cli.backends.registry import RegistryBackend
from updraft_cli.backends.speculators import Speculator

__all__ = ["chromium"]  # a fixture

pytestmark = [pytest.mark.timeout(2400), pytest.mark.lasts(800)]

_OBJECTS = "/apis/updraft.dev/v1alpha1/namespaces/default"
_TOUR, _VERSIONS = f"{_OBJECTS}/adaptivespeculators/tour", f"{_OBJECTS}/draftversions"

_CLICK_S = 180.0
"""From a click until pods and answers follow, on a busy machine."""

_KILL_S = 30.0
"""After a pod was killed, until no Service leads to it any more."""


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tour]:
    if why := tours.obstacle():
        pytest.skip(why)
    with tours.tour(tmp_path_factory.mktemp("tour"), num_volumes=7) as running:
        yield running


def test_the_tour_ends_where_it_says(tour: Tour, request: pytest.FixtureRequest, subtests: pytest.Subtests) -> None:
    with tour.node.api() as api:
        tour.run("Install")
        _apply(tour)
        with traffic(tour, api) as answers:
            tour.run("Train a draft")
            assert _phases(api.get(f"{_VERSIONS}/tour-v2"))[0] in ("Canary", "Held", "Pending"), (
                "it was not simply served"
            )
            wait_until(lambda: _tried(api) > 1, timeout_s=300, what="a canary of a second version")
            pods = _pod_uids(api)
            with subtests.test("decisions by click"):  # skipped without a browser
                _click(tour, api, answers, request)
            tour.run("Roll back")
            assert _pod_uids(api) == pods, "no pod restarted"
            wait_until(lambda: answers.last_versions(6) == {1}, timeout_s=60, what="answers drafted by version 1")
            _check_two_tenants(tour, api)
        tour.tag_images("next")
        with _vllm(tour, api, subtests), traffic(tour, api):
            _upgrade(tour, api, answers, pods)
        with traffic(tour, api):
            killed_at = _break(tour, answers)
        late = [each for each in answers.failures() if not killed_at <= each["ended"] <= killed_at + _KILL_S]
        assert late == [], "only requests inside the killed pod are lost"
        assert answers.versions_since(killed_at) <= {0, 1}, "the pin outlived the registry and the operator"
        *_, crds = tour.run("Clean up")
        assert sorted(crds.split()) == [
            "customresourcedefinition.apiextensions.k8s.io/adaptivespeculators.updraft.dev",
            "customresourcedefinition.apiextensions.k8s.io/draftimports.updraft.dev",
            "customresourcedefinition.apiextensions.k8s.io/draftversions.updraft.dev",
        ]
        _check_nothing_is_left(tour)


def _apply(tour: Tour) -> None:
    """Its last commands start a port-forward in the background, use it and end it: one shell for the three."""
    *first, forward, ask, end = section("Apply one resource")
    for command in first:
        tour.shell(command)
    answer = json.loads(tour.shell(f"{forward.removesuffix('&')} >/dev/null &\n{ask}\n{end}"))
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] > 0


def _check_two_tenants(tour: Tour, api: Api) -> None:
    """The refused commands have changed nothing, and the second team has no version of the first."""
    tour.type("Two tenants")
    versions = "/apis/updraft.dev/v1alpha1/namespaces/team-b/draftversions"
    assert api.get(versions)["items"] == []
    assert api.get(_TOUR)["spec"]["rollout"]["pinnedVersion"] == 1
    context = KubeContext(kubeconfig=tour.node.kubeconfig)
    with forwarded(ClusterBackend(context=context, speculator="tour")) as cluster:
        assert _registry(cluster).pinned == 1
    installation = api.get("/api/v1/namespaces/updraft-system")["metadata"]["uid"]
    key = f"updraft:{{{installation}:default:tour:0}}:samples:v1"
    redis = "kubectl exec updraft-redis-0 --namespace updraft-system -- redis-cli -s /run/redis/redis.sock"
    assert tour.shell(f"{redis} exists '{key}'").strip() == "1", "it is the key of the first team's traces"


def _vllm(tour: Tour, api: Api, subtests: pytest.Subtests) -> AbstractContextManager[None]:
    """What is inside happens to an attached vLLM too, if that is installed here."""
    if not (why := somebodys_vllm.obstacle()):
        return _attached(Vllm(tour=tour, api=api))
    with subtests.test("attach"):
        pytest.skip(f"the page's sections Attach and Detach: {why}")
    return nullcontext()


@contextmanager
def _attached(vllm: Vllm) -> Iterator[None]:
    """Attach to a vLLM that serves, and detach from it after what is inside: it restarts for the patch only."""
    apply, wait, *patch, create, promoted = section("Attach")
    assert [apply, wait, *patch] == section("Attach by hand", "attach")
    with vllm.running():
        alone = vllm.uids()
        vllm.tour.shell(apply)
        vllm.tour.shell(wait)
        wait_until(lambda: vllm.attached() == ("False", "NotInjected"), timeout_s=60, what="what is missing in the pod")
        assert vllm.uids() == alone
        template = vllm.template()
        for command in patch:
            vllm.tour.shell(command)
        pods = vllm.uids()
        with vllm.traffic() as answers:
            vllm.tour.shell(create)
            vllm.tour.shell(promoted)
            vllm.wait_for_a_version()
            began_at = time.time()
            yield
            assert answers.num_since(began_at) > 10, "it served meanwhile"
            again, look, delete, listed, undo = section("Detach")
            vllm.tour.shell(again)
            wait_until(lambda: vllm.attached() == ("True", "Outdated"), what="that the pods were left to their owner")
            assert "attached with former images" in vllm.tour.shell(look)
            vllm.tour.shell(delete)
            wait_until(lambda: not vllm.made_by_the_operator(), timeout_s=120, what="the end of all that was made")
            deleted_at = time.time()
            wait_until(lambda: answers.num_since(deleted_at) > 10, timeout_s=60, what="answers without the resource")
        assert answers.failures() == []
        assert vllm.uids() == pods, "no draft, upgrade or deletion restarted it"
        assert vllm.tour.shell(listed)
        vllm.tour.shell(undo)
        assert vllm.template() == template


def _upgrade(tour: Tour, api: Api, answers: Traffic, pods: set[str]) -> None:
    """Nothing is lost while all pods are replaced."""
    began_at = time.time()
    tour.run("Upgrade")
    assert not _pod_uids(api) & pods, "all pods were replaced"
    for part in ("inference", "trainer", "registry", "operator"):
        assert _images(api, part) == {updraft_images.reference(part, "next")}
    wait_until(
        lambda: answers.num_since(began_at) > 10 and answers.last_versions(6) == {1},
        timeout_s=180,
        what="answers of the new pods, drafted by version 1",
    )
    assert answers.failures() == []


def _break(tour: Tour, answers: Traffic) -> float:
    """Return when the crashes began."""
    killed_at = time.time()
    tour.run("Break it")
    ended_at = time.time()
    # A new pod is Ready without a draft, and fetches it then.
    wait_until(
        lambda: answers.num_since(ended_at) > 10 and answers.last_versions(6) == {1},
        timeout_s=180,
        what="answers after all, drafted by version 1",
    )
    return killed_at


def _click(tour: Tour, api: Api, answers: Traffic, request: pytest.FixtureRequest) -> None:
    """Pin the newest version that was tried, roll back and end the pin, as a person does in a browser."""
    chromium: Browser = request.getfixturevalue("chromium")
    tried = _tried(api)
    with (
        console(tour) as address,
        forwarded(ClusterBackend(context=KubeContext(kubeconfig=tour.node.kubeconfig), speculator="tour")) as cluster,
    ):
        origin = address.partition("/?")[0]
        chromium.open(address)
        chromium.open(f"{origin}/s/tour/versions/{tried}")
        chromium.click("Pin this version")
        chromium.click("Pin it")
        _check_serves(tried, api, cluster, answers)
        chromium.open(f"{origin}/s/tour/history")
        previous = _registry(cluster).previous
        chromium.click(f"Roll back to version {previous}")
        assert f"All pods load version {previous} now" in chromium.text("main")
        chromium.click("Pin it")
        _check_serves(previous, api, cluster, answers)
        chromium.open(f"{origin}/s/tour/fleet")
        wait_until(
            lambda: f"version {previous}: 2 pods" in chromium.text("main").lower(),
            timeout_s=_CLICK_S,
            what="the page follows the pods",
        )
        chromium.open(f"{origin}/s/tour/history")
        chromium.click("End the pin")
        chromium.click("End the pin")
        assert "pinnedVersion" not in api.get(_TOUR)["spec"]["rollout"]
        wait_until(lambda: _registry(cluster).pinned is None, timeout_s=_CLICK_S, what="the registry's pin has ended")
        chromium.leave()


def _check_serves(version: int, api: Api, cluster: ForwardedBackend, answers: Traffic) -> None:
    """Check that resource, registry, both pods and the clients' answers follow a click that pinned a version."""
    assert api.get(_TOUR)["spec"]["rollout"]["pinnedVersion"] == version
    wait_until(
        lambda: _registry(cluster).pinned == version, timeout_s=_CLICK_S, what=f"version {version} in the registry"
    )
    states = cluster.snapshots()
    wait_until(
        lambda: [pod.version for pod in next(states).speculators[0].pods] == [version, version],
        timeout_s=_CLICK_S,
        what=f"both pods say that they hold version {version}",
    )
    wait_until(
        lambda: answers.last_versions(6) == {version}, timeout_s=_CLICK_S, what=f"answers drafted by version {version}"
    )


@contextmanager
def console(tour: Tour) -> Iterator[str]:
    """`kubectl updraft ui`; the address that it prints."""
    command = ["kubectl", "updraft", "ui", "tour", "--no-browser"]
    with subprocess.Popen(command, env=tour.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def _registry(cluster: ForwardedBackend) -> Speculator:
    """The registry's own answer, through a port-forward."""
    found: list[RegistryBackend] = []
    states = cluster.snapshots()

    def has_answered() -> bool:
        next(states)
        found.extend(filter(None, [cluster.reports.registry("tour")]))
        return bool(found)

    wait_until(has_answered, timeout_s=60, what="an answer of the registry")
    return found[-1].rollout(None)


def _tried(api: Api) -> int:
    """The newest version that is or was in canary; 0 if none was."""
    return max(
        (each["spec"]["version"] for each in api.get(_VERSIONS)["items"] if "Canary" in _phases(each)), default=0
    )


def _phases(version: Json) -> list[str]:
    """What a DraftVersion has been, oldest first."""
    status = version.get("status", {})
    return [each["phase"] for each in status.get("history", [])] or [status.get("phase", "")]


def _pod_uids(api: Api) -> set[str]:
    """The serving pods, but for those that finish their last requests."""
    selector = "updraft.dev/speculator=tour,app.kubernetes.io/component=serving"
    pods = api.get("/api/v1/namespaces/default/pods", labelSelector=selector)["items"]
    return {pod["metadata"]["uid"] for pod in pods if "deletionTimestamp" not in pod["metadata"]}


def _images(api: Api, part: str) -> set[str]:
    """The images of a part's pods in all namespaces, but for those that end or have ended, and those attached to."""
    pods = api.get("/api/v1/pods", fieldSelector="status.phase=Running", labelSelector="!updraft.dev/attach")["items"]
    staying = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    found = (
        each["image"]
        for pod in staying
        for each in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", ()))
    )
    return {image for image in found if image.startswith(updraft_images.reference(part, ""))}


def _check_nothing_is_left(tour: Tour) -> None:
    kinds = "all,cm,secrets,sa,pvc,pdb,netpol,roles,rolebindings,leases"
    ours = "updraft.dev/speculator=tour"
    found = tour.shell(f"kubectl get {kinds} -l {shlex.quote(ours)} -o name").split()
    assert found == ["persistentvolumeclaim/data-tour-registry-0"], "Retain keeps the versions, and nothing else stays"
    allowed = {"configmap/kube-root-ca.crt", "serviceaccount/default"}

    def left() -> set[str]:
        return set(tour.shell(f"kubectl get {kinds} --namespace updraft-system -o name").split()) - allowed

    wait_until(lambda: left() == set(), timeout_s=60, what="the end of all that helm had installed")
    clusterwide = tour.shell("kubectl get clusterroles,clusterrolebindings -o name")
    assert "updraft" not in clusterwide
