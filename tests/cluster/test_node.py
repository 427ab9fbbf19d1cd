"""The node runs pods for real: from images packed or built here, found by name, and shown as they are when they fail."""

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster import cgroups, debian, images, programs
from tests.cluster import cluster as clusters
from tests.cluster.access import Api, Json
from tests.cluster.cluster import GPU, GPUS, Cluster, cluster
from tests.cluster.dockerfiles import Builder
from tests.support.processes import is_alive
from tests.support.wait import wait_until

# Where programs of a node write, whatever they are told.
_PLACES = (
    *("/etc/cni/net.d", "/etc/containers", "/opt/cni", "/opt/containerd", "/run/netns", "/var/lib/cni"),
    *("/var/lib/containerd", "/var/lib/containers", "/var/lib/kubelet", "/var/log/containers", "/var/log/pods"),
)
TOY = "docker.io/library/toy:1"


@pytest.fixture(scope="session")
def toy(node: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of an image on the node whose program serves, asks, eats or fails."""
    archive = tmp_path_factory.mktemp("images") / "toy.tar"
    images.pack(archive, TOY, programs.path("toy"))
    node.load(archive)
    return TOY


@pytest.fixture
def api(node: Cluster) -> Iterator[Api]:
    with node.api() as client:
        yield client


@pytest.fixture
def pods(api: Api) -> Iterator[str]:
    """The pods of an empty namespace, as a path."""
    name = f"test-{secrets.token_hex(4)}"
    api.create("/api/v1/namespaces", {"metadata": {"name": name}})
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    wait_until(lambda: api.exists(account), what="the namespace's service account")
    yield f"/api/v1/namespaces/{name}/pods"
    api.delete(f"/api/v1/namespaces/{name}")


def _pod(name: str, image: str, *arguments: str, **container: object) -> Json:
    return {
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "restartPolicy": "OnFailure",
            "containers": [{"name": "main", "image": image, "args": list(arguments), **container}],
        },
    }


def _state(api: Api, pod: str) -> Json:
    """Of its only container: `{"waiting": {"reason": ...}}`, `{"running": ...}` or `{"terminated": ...}`; or nothing yet."""
    statuses = api.get(pod)["status"].get("containerStatuses", [])
    state: Json = statuses[0]["state"] if statuses else {}
    return state


def _has_succeeded(api: Api, pod: str) -> bool:
    return bool(api.get(pod)["status"]["phase"] == "Succeeded")


def test_a_pod_answers_another_through_a_service_by_its_name(api: Api, pods: str, toy: str) -> None:
    probe = {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}
    api.create(pods, _pod("server", toy, "serve", readinessProbe=probe))
    service = {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]}
    api.create(pods.replace("/pods", "/services"), {"metadata": {"name": "greeter"}, "spec": service})
    namespace = pods.split("/")[4]

    api.create(pods, _pod("client", toy, "get", f"http://greeter.{namespace}.svc.cluster.local/"))

    wait_until(lambda: _has_succeeded(api, f"{pods}/client"), what="the answer")
    assert api.text(f"{pods}/client/log") == "hello from server\n"


def test_an_image_from_a_dockerfile_runs(node: Cluster, api: Api, pods: str, tmp_path: Path) -> None:
    context, builder = tmp_path / "context", Builder(tmp_path / "builder")
    context.mkdir()
    shutil.copy(programs.path("toy"), context / "program")
    (context / "Dockerfile").write_text(
        'FROM scratch\nCOPY program /program\nUSER 10001\nENTRYPOINT ["/program", "serve"]\n'
    )
    builder.build(context, "docker.io/library/built:1")
    builder.save("docker.io/library/built:1", tmp_path / "built.tar")
    node.load(tmp_path / "built.tar")
    restricted = {
        "runAsNonRoot": True,
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }

    api.create(pods, _pod("built", "docker.io/library/built:1", securityContext=restricted))

    wait_until(lambda: "running" in _state(api, f"{pods}/built"), what="the start of the pod")
    wait_until(lambda: "serving" in api.text(f"{pods}/built/log"), what="the program's first words")


def test_an_image_with_python_and_what_pip_installs_runs(node: Cluster, api: Api, pods: str, tmp_path: Path) -> None:
    builder = debian.builder()
    (tmp_path / "Dockerfile").write_text(
        "FROM python:3.11-slim-bookworm AS build\n"
        "RUN python -m venv /opt/venv && /opt/venv/bin/pip install --quiet --no-cache-dir idna\n"
        "FROM python:3.11-slim-bookworm\n"
        "COPY --from=build /opt/venv /opt/venv\n"
        'CMD ["/opt/venv/bin/python", "-c", "import idna; print(idna.encode(\'b\\u00fccher.de\').decode())"]\n'
    )
    builder.build(tmp_path, "docker.io/library/python-toy:1")
    builder.save("docker.io/library/python-toy:1", tmp_path / "image.tar")
    node.load(tmp_path / "image.tar")

    api.create(pods, _pod("python", "docker.io/library/python-toy:1"))

    wait_until(lambda: _has_succeeded(api, f"{pods}/python"), what="the end of the pod")
    assert api.text(f"{pods}/python/log") == "xn--bcher-kva.de\n"


def test_a_container_that_takes_more_memory_than_its_limit_is_seen_as_killed_for_it(
    api: Api, pods: str, toy: str
) -> None:
    pod = _pod("eater", toy, "eat", resources={"limits": {"memory": "32Mi"}})
    pod["spec"]["restartPolicy"] = "Never"
    api.create(pods, pod)

    wait_until(lambda: "terminated" in _state(api, f"{pods}/eater"), what="the end of the container")
    ended = _state(api, f"{pods}/eater")["terminated"]
    assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137)


def test_an_image_that_nobody_has_is_seen_as_such_soon(api: Api, pods: str) -> None:
    api.create(pods, _pod("hopeful", "registry.example.test/nothing:1"))

    def reason() -> str:
        return str(_state(api, f"{pods}/hopeful").get("waiting", {}).get("reason", ""))

    wait_until(lambda: reason() in {"ErrImagePull", "ImagePullBackOff"}, what="the refusal")


def test_a_container_that_fails_again_and_again_is_seen_to_back_off(api: Api, pods: str, toy: str) -> None:
    api.create(pods, _pod("failing", toy, "fail"))

    def reason() -> str:
        return str(_state(api, f"{pods}/failing").get("waiting", {}).get("reason", ""))

    wait_until(lambda: reason() == "CrashLoopBackOff", what="the back-off")


def test_a_pod_gets_as_many_gpus_as_the_node_has_and_not_one_more(api: Api, pods: str, toy: str) -> None:
    api.create(pods, _pod("most", toy, "serve", resources={"limits": {GPU: str(GPUS)}}))
    wait_until(lambda: "running" in _state(api, f"{pods}/most"), what="the start of the first pod")
    api.create(pods, _pod("late", toy, "serve", resources={"limits": {GPU: "1"}}))

    def refusals() -> list[str]:
        conditions = api.get(f"{pods}/late")["status"].get("conditions", [])
        return [condition["message"] for condition in conditions if condition.get("reason") == "Unschedulable"]

    wait_until(lambda: refusals() != [], what="the scheduler's word")
    assert f"Insufficient {GPU}" in refusals()[0]


def test_kubectl_reaches_into_a_pod(node: Cluster, api: Api, pods: str, toy: str) -> None:
    api.create(pods, _pod("server", toy, "serve"))
    wait_until(lambda: "running" in _state(api, f"{pods}/server"), what="the start of the pod")
    namespace = f"--namespace={pods.split('/')[4]}"

    answer = node.kubectl("exec", "server", namespace, "--", "/toy", "get", "http://localhost:8080/")

    assert answer == "hello from server\n"


def test_the_cluster_has_no_interface_that_leads_out(node: Cluster) -> None:
    links = {line.split()[0].split("@")[0] for line in node.enter("ip", "-brief", "link").splitlines()}

    assert {"lo", "node0", "node0-end"} <= links
    assert {link for link in links if not link.startswith("veth")} <= {"lo", "node0", "node0-end", "pods0"}


def test_nothing_is_left_of_a_cluster_that_is_down() -> None:
    if why := clusters.obstacle():
        pytest.skip(why)
    before = _machine()
    with cluster() as running:
        folder, processes = running.folder, running.processes()
        assert {"kubelet", "containerd", "etcd"} <= {process.name() for process in processes}
        assert cgroups.existing(clusters.cgroup(folder)) != []

    assert [process for process in processes if is_alive(process.pid)] == []
    assert cgroups.existing(clusters.cgroup(folder)) == []
    assert not folder.exists()
    assert _machine() == before


def _machine() -> dict[str, list[str]]:
    """Of this machine what a cluster could change: interfaces, settings, and what is in or mounted on fixed places."""
    listed = {place: _names(Path(place)) for place in (*_PLACES, "/run", "/sys/class/net")}
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    mounts = sorted(point for point in points if point.startswith(("/etc", "/opt", "/proc", "/run", "/sys", "/var")))
    settings = [Path(f"/proc/sys/{name}").read_text() for name in ("vm/overcommit_memory", "kernel/panic")]
    return {**listed, "mounts": mounts, "settings": settings}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
