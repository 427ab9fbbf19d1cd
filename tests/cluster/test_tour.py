"""docs/tour.md, command by command, on a real node with our own images, under traffic from its first draft to its end."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster import cluster as clusters
from tests.cluster import debian, programs, updraft_images
from tests.cluster.access import Api
from tests.cluster.cluster import Cluster, cluster
from tests.cluster.programs import CHECKOUT
from tests.support.tiny_target import make_tiny_target
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.wait import wait_until

pytestmark = [pytest.mark.timeout(2400), pytest.mark.lasts(240)]

_REDIS = "docker.io/library/redis:8.2-bookworm"
_KILL_S = 30.0
"""After a pod was killed, until no Service leads to it any more."""

# A tiny target learns in seconds what a real one needs minutes for.
_SERVING = {
    "UPDRAFT_INFERENCE_DTYPE": "float32",
    "UPDRAFT_INFERENCE_MAX_CONTEXT": "256",
    "UPDRAFT_INFERENCE_NUM_THREADS": "1",
    "UPDRAFT_INFERENCE_CAPTURE_EVALUATION_FRACTION": "0.3",
}
_TRAINER = {
    "UPDRAFT_TRAINER_DRAFT_VOCAB_SIZE": "512",
    "UPDRAFT_TRAINER_LEARNING_RATE": "0.003",
    "UPDRAFT_TRAINER_ADAPTATION_RATE": "0.003",
    "UPDRAFT_TRAINER_EVALUATE_SECONDS": "2",
    "UPDRAFT_TRAINER_CHECKPOINT_SECONDS": "2",
    "UPDRAFT_TRAINER_MAX_USES": "50",
    "UPDRAFT_TRAINER_NICENESS": "0",  # the test waits for it, and shares its cores with the traffic
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tour:
    """The page, and where its commands run."""

    node: Cluster
    folder: Path
    """With charts, examples and values.yaml in it."""
    environment: dict[str, str]

    def run(self, title: str) -> list[str]:
        """Run the commands of a section; what each printed. AssertionError with the words of the first that fails."""
        return [self.shell(command) for command in section(title)]

    def shell(self, command: str) -> str:
        """Run one command line, of which a last `&` was cut."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            text=True,
            capture_output=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}\n{self.state()}"
        return done.stdout

    def state(self) -> str:
        """What a person would look at when something went wrong."""
        looks = (
            "kubectl get pods -A -o wide",
            "kubectl get asp,dver -A",
            "kubectl describe asp tour",
            "kubectl -n updraft-system logs -l app.kubernetes.io/name=updraft-operator --tail=20",
            "kubectl logs -l updraft.dev/speculator=tour --all-containers --tail=15 --prefix",
        )
        shown = [
            subprocess.run(["bash", "-c", look], env=self.environment, text=True, capture_output=True, check=False)
            for look in looks
        ]
        return "\n".join(f"{each.stdout}{each.stderr}" for each in shown)[-12_000:]


def section(title: str) -> list[str]:
    """The commands below a heading of the page."""
    page = (CHECKOUT / "docs" / "tour.md").read_text()
    body = re.split(r"^## ", page, flags=re.MULTILINE)
    found = next(part for part in body if part.startswith(f"{title}\n"))
    blocks = re.findall(r"```console\n(.*?)```", found, flags=re.DOTALL)
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tour]:
    if why := clusters.obstacle():
        pytest.skip(why)
    if missing := [name for module in programs.MODULES for name in module.packages if programs.find(name) is None]:
        pytest.skip(f"{', '.join(missing)}: not built; run `make cluster-build`")
    ours = updraft_images.built()
    folder = tmp_path_factory.mktemp("tour")
    with cluster() as node:
        ours.load(node)
        _load_redis(node, folder)
        with node.api() as api:
            _make_volumes(api, node.folder / "volumes")
        _write_files(folder)
        yield Tour(node=node, folder=folder, environment=_environment(node))


def test_the_tour_ends_where_it_says(tour: Tour) -> None:
    with tour.node.api() as api:
        tour.run("Install")
        _apply(tour)
        with _traffic(tour, api) as traffic:
            tour.run("Train a draft")
            assert _phases(api, "tour-v2")[0] in ("Canary", "Held", "Pending"), "it was not simply served"
            wait_until(lambda: "Canary" in _phases(api, _newest(api)), timeout_s=300, what="a canary")
            pods = _pod_uids(api)
            tour.run("Roll back")
            assert _pod_uids(api) == pods, "no pod restarted"
            wait_until(lambda: traffic.last_versions(6) == {1}, timeout_s=60, what="answers drafted by version 1")
            assert traffic.failures() == []
            killed_at = time.time()
            tour.run("Break it")
            ended_at = time.time()
            # A new pod is Ready without a draft, and fetches it then.
            wait_until(
                lambda: traffic.num_since(ended_at) > 10 and traffic.last_versions(6) == {1},
                timeout_s=180,
                what="answers after all, drafted by version 1",
            )
        late = [each for each in traffic.failures() if not killed_at <= each["ended"] <= killed_at + _KILL_S]
        assert late == [], "only requests inside the killed pod are lost"
        assert traffic.versions_since(killed_at) <= {0, 1}, "the pin outlived the registry and the operator"
        *_, crds = tour.run("Clean up")
        assert sorted(crds.split()) == [
            "customresourcedefinition.apiextensions.k8s.io/adaptivespeculators.updraft.dev",
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


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was answered so far."""

    file: Path

    def all(self) -> list[dict[str, Any]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def failures(self) -> list[dict[str, Any]]:
        return [each for each in self.all() if each["status"] != 200]

    def last_versions(self, number: int) -> set[int]:
        return {each["version"] for each in self.all()[-number:] if each["status"] == 200}

    def num_since(self, moment: float) -> int:
        return len(self._answers_since(moment))

    def versions_since(self, moment: float) -> set[int]:
        return {each["version"] for each in self._answers_since(moment)}

    def _answers_since(self, moment: float) -> list[dict[str, Any]]:
        return [each for each in self.all() if each["status"] == 200 and each["began"] > moment]


@contextmanager
def _traffic(tour: Tour, api: Api) -> Iterator[Traffic]:
    address = api.get("/api/v1/namespaces/default/services/tour")["spec"]["clusterIP"]
    file = tour.folder / "traffic.jsonl"
    sender = tour.node.start(sys.executable, "-m", "tests.cluster.traffic", f"http://{address}", file)
    try:
        yield Traffic(file)
    finally:
        os.killpg(sender.pid, signal.SIGKILL)
        sender.wait()


def _load_redis(node: Cluster, folder: Path) -> None:
    builder = debian.builder()
    builder.build(CHECKOUT / "tests" / "cluster" / "config", _REDIS, dockerfile="redis.Dockerfile")
    builder.save(_REDIS, folder / "redis.tar")
    node.load(folder / "redis.tar")
    (folder / "redis.tar").unlink()


def _make_volumes(api: Api, folder: Path) -> None:
    """One for each claim of the tour, since nobody provisions any here, and one with the target in it."""
    for name in ("one", "two", "three"):
        (folder / name).mkdir(parents=True)
        (folder / name).chmod(0o777)  # a hostPath takes no fsGroup
        _make_volume(api, name, folder / name)
    write_tokenizer(make_tiny_target(folder / "models" / "tour", seed=1))
    for file in (folder / "models" / "tour").iterdir():
        file.chmod(0o644)  # as a download has it
    _make_volume(api, "models", folder / "models", claim="models")
    spec = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "1Gi"}},
        "volumeName": "models",
        "storageClassName": "models",
    }
    claim = {"metadata": {"name": "models"}, "spec": spec}
    api.create("/api/v1/namespaces/default/persistentvolumeclaims", claim)


def _make_volume(api: Api, name: str, path: Path, *, claim: str = "") -> None:
    spec: dict[str, Any] = {
        "capacity": {"storage": "100Gi"},
        "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
        "persistentVolumeReclaimPolicy": "Retain",
        "hostPath": {"path": str(path)},
    }
    if claim:
        spec["storageClassName"] = claim
    api.create("/api/v1/persistentvolumes", {"metadata": {"name": name}, "spec": spec})


def _write_files(folder: Path) -> None:
    """What the page's commands read, as they name it."""
    (folder / "charts").symlink_to(CHECKOUT / "charts")
    (folder / "examples").mkdir()
    example = yaml.safe_load((CHECKOUT / "examples" / "tour.yaml").read_text())
    example["spec"]["targetModel"]["uri"] = "pvc://models/tour"
    example["spec"]["serving"]["env"] = _variables(_SERVING)
    example["spec"]["trainer"] = {"env": _variables(_TRAINER)}
    # For a tiny target drafting costs as much as verifying, so its first version would rightly be rolled back.
    example["spec"]["rollout"]["analysis"]["dryRun"] = True
    (folder / "examples" / "tour.yaml").write_text(yaml.safe_dump(example))
    images = {extra: {"repository": f"updraft/{extra}", "tag": "test"} for extra in updraft_images.EXTRAS}
    values = {"image": {"registry": "docker.io"}, "images": images}
    (folder / "values.yaml").write_text(yaml.safe_dump(values))


def _variables(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _environment(node: Cluster) -> dict[str, str]:
    """KUBECONFIG, and the cluster's programs and ours on the PATH."""
    path = f"{programs.binaries()}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "KUBECONFIG": str(node.kubeconfig), "PATH": path}


def _newest(api: Api) -> str:
    found = api.get("/apis/updraft.dev/v1alpha1/namespaces/default/draftversions")["items"]
    return f"tour-v{max(each['spec']['version'] for each in found)}"


def _phases(api: Api, name: str) -> list[str]:
    """What it has been, oldest first."""
    status = api.get(f"/apis/updraft.dev/v1alpha1/namespaces/default/draftversions/{name}").get("status", {})
    return [each["phase"] for each in status.get("history", [])] or [status.get("phase", "")]


def _pod_uids(api: Api) -> set[str]:
    selector = "updraft.dev/speculator=tour,app.kubernetes.io/component=serving"
    pods = api.get("/api/v1/namespaces/default/pods", labelSelector=selector)["items"]
    return {pod["metadata"]["uid"] for pod in pods}


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
