"""A cluster for the tour or a test like it: a node with our images, Redis, volumes, a tiny target, and traffic."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.cluster import cluster as clusters
from tests.cluster import debian, programs, updraft_images
from tests.cluster.access import Api
from tests.cluster.cluster import Cluster, cluster
from tests.cluster.programs import CHECKOUT
from tests.support.tiny_target import make_tiny_target
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.trainer import FAST

_REDIS = "docker.io/library/redis:8.2-bookworm"

_TEAM_B_MODELS = "models-team-b"
_ENDED = "-- ended with"

_SERVING = {
    "UPDRAFT_INFERENCE_DTYPE": "float32",
    "UPDRAFT_INFERENCE_MAX_CONTEXT": "256",
    "UPDRAFT_INFERENCE_NUM_THREADS": "1",
    "UPDRAFT_INFERENCE_CAPTURE_EVALUATION_FRACTION": "0.3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tour:
    """The page, and where its commands run."""

    node: Cluster
    folder: Path
    """With charts, examples and values.yaml in it."""
    environment: dict[str, str]

    def run(self, title: str, page: str = "tour") -> list[str]:
        """Run the commands of a section; what each printed. AssertionError with the words of the first that fails."""
        return [self.shell(command) for command in section(title, page)]

    def shell(self, command: str) -> str:
        """Run one command line, of which a last `&` was cut. AssertionError if it fails or takes longer than 20 minutes."""
        try:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=self.folder,
                env=self.environment,
                text=True,
                capture_output=True,
                check=False,
                timeout=1200,
            )
        except subprocess.TimeoutExpired as late:
            raise AssertionError(f"$ {command}\nhas not ended after {late.timeout:.0f} s\n{self.state()}") from late
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}\n{self.state()}"
        return done.stdout

    def type(self, title: str) -> None:
        """Type the commands of a section into one shell: those with a line below them are refused with it, others work."""
        commands = shown(title)
        script = "\n".join(f"{_when_it_listens(command)}\nprintf '\\n{_ENDED} %s\\n' $?" for command, _ in commands)
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=900,
        )
        *told, _ = re.split(rf"^{_ENDED} (\d+)\n", done.stdout, flags=re.MULTILINE)
        for (command, lines), output, status in zip(commands, told[::2], told[1::2], strict=True):
            expected = "a refusal, as a line is shown below it" if lines else "0"
            assert (status != "0") is bool(lines), f"$ {command}\nended with {status}, not {expected}:\n{output}"
            for line in lines:
                assert line.removesuffix("...") in output, f"$ {command}\n{output}"

    def tag_images(self, tag: str) -> None:
        """Give the node's images of ours this tag too, as those of a newer release would have it."""
        for extra in updraft_images.EXTRAS:
            names = (updraft_images.reference(extra), updraft_images.reference(extra, tag))
            self.node.enter("ctr", "-n", "k8s.io", "images", "tag", *names)

    def state(self) -> str:
        """What a person would look at when something went wrong."""
        looks = (
            "kubectl get pods -A -o wide",
            "kubectl get asp,dver -A",
            "kubectl describe asp",
            "kubectl -n updraft-system logs -l app.kubernetes.io/name=updraft-operator --tail=20",
            "kubectl logs -l updraft.dev/speculator --all-containers --tail=15 --prefix",
            "kubectl logs -l updraft.dev/attach --all-containers --tail=15 --prefix",
        )
        shown = [
            subprocess.run(["bash", "-c", look], env=self.environment, text=True, capture_output=True, check=False)
            for look in looks
        ]
        return "\n".join(f"{each.stdout}{each.stderr}" for each in shown)[-12_000:]


def section(title: str, page: str = "tour") -> list[str]:
    """The commands below a heading of a page."""
    return [command for command, _ in shown(title, page)]


def shown(title: str, page: str = "tour") -> list[tuple[str, list[str]]]:
    """The commands below a heading of a page, and the lines below each."""
    text = (CHECKOUT / "docs" / f"{page}.md").read_text()
    body = re.split(r"^## ", text, flags=re.MULTILINE)
    found = next(part for part in body if part.startswith(f"{title}\n"))
    blocks = re.findall(r"```console\n(.*?)```", found, flags=re.DOTALL)
    commands: list[tuple[str, list[str]]] = []
    for line in (line for block in blocks for line in block.replace("\\\n", " ").splitlines()):
        if line.startswith("$ "):
            commands.append((line.removeprefix("$ "), []))
        else:
            commands[-1][1].append(line)
    return commands


def _when_it_listens(command: str) -> str:
    """A port-forward in the background, and the time that a person takes for the next line."""
    forward = re.search(r"port-forward \S+ (\d+).*&$", command)
    if forward is None:
        return command
    is_open = f"(exec 3<>/dev/tcp/127.0.0.1/{forward[1]}) 2>/dev/null"
    return f"{command}\nuntil {is_open} || ! kill -0 $!; do sleep 0.2; done"


def obstacle() -> str:
    """Why there can be no tour here; empty if there can."""
    missing = [name for module in programs.MODULES for name in module.packages if programs.find(name) is None]
    return clusters.obstacle() or (f"{', '.join(missing)}: not built; run `make cluster-build`" if missing else "")


@contextmanager
def tour(folder: Path, *, num_volumes: int, **spec: Mapping[str, Any]) -> Iterator[Tour]:
    """A node that is ready for the page's commands; `spec` changes parts of its resource."""
    clusters.make_room()
    ours = updraft_images.built()
    with cluster(ours.give) as node:
        _load_redis(node, folder)
        with node.api() as api:
            _make_volumes(api, node.folder / "volumes", num_volumes)
        _write_files(folder, spec)
        yield Tour(node=node, folder=folder, environment=_environment(node))


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
def traffic(tour: Tour, api: Api, prompts: str = "prompt") -> Iterator[Traffic]:
    """Requests without end to the tour's Service, whose prompts begin so."""
    address = api.get("/api/v1/namespaces/default/services/tour")["spec"]["clusterIP"]
    with requests(tour, f"http://{address}", model="tour", prompts=prompts) as answers:
        yield answers


@contextmanager
def requests(tour: Tour, url: str, *, model: str, prompts: str = "prompt") -> Iterator[Traffic]:
    """Requests without end to any server; what was answered before under this model's name still counts."""
    file = tour.folder / f"{model}.jsonl"
    sender = tour.node.start(sys.executable, "-m", "tests.cluster.traffic", url, file, model, prompts)
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


def _make_volumes(api: Api, folder: Path, num_volumes: int) -> None:
    """One for each claim of the tour, since nobody provisions any here, and for each namespace one with the target in it."""
    for name in map(str, range(num_volumes)):
        (folder / name).mkdir(parents=True)
        (folder / name).chmod(0o777)  # a hostPath takes no fsGroup
        _make_volume(api, f"volume-{name}", folder / name)
    write_tokenizer(make_tiny_target(folder / "models" / "tour", seed=1))
    for file in (folder / "models" / "tour").iterdir():
        file.chmod(0o644)  # as a download has it
    for name in ("models", _TEAM_B_MODELS):
        _make_volume(api, name, folder / "models", claim=name)
    api.create("/api/v1/namespaces/default/persistentvolumeclaims", _models("models"))


def _models(volume: str) -> dict[str, Any]:
    """A namespace's claim to the target."""
    spec = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "1Gi"}},
        "volumeName": volume,
        "storageClassName": volume,
    }
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"}, "spec": spec}


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


def _write_files(folder: Path, spec: Mapping[str, Mapping[str, Any]]) -> None:
    """What the page's commands read, as they name it."""
    (folder / "charts").symlink_to(CHECKOUT / "charts")
    (folder / "examples").mkdir()
    example = _example("tour")
    # For a tiny target drafting costs as much as verifying, so its first version would rightly be rolled back.
    example["spec"]["rollout"]["analysis"]["dryRun"] = True
    for part, fields in spec.items():
        example["spec"][part] |= fields
    (folder / "examples" / "tour.yaml").write_text(yaml.safe_dump(example))
    team_b = [_models(_TEAM_B_MODELS), _example("tour-team-b")]
    (folder / "examples" / "tour-team-b.yaml").write_text(yaml.safe_dump_all(team_b))
    images = {extra: {"repository": f"updraft/{extra}"} for extra in updraft_images.EXTRAS}
    values = {"image": {"registry": "docker.io", "tag": updraft_images.TAG}, "images": images}
    (folder / "values.yaml").write_text(yaml.safe_dump(values))


def _example(name: str) -> dict[str, Any]:
    """One of the page's own, for a tiny target on a volume."""
    example: dict[str, Any] = yaml.safe_load((CHECKOUT / "examples" / f"{name}.yaml").read_text())
    example["spec"]["targetModel"]["uri"] = "pvc://models/tour"
    example["spec"]["serving"]["env"] = _variables(_SERVING)
    example["spec"]["trainer"] = {"env": _variables(FAST)}
    return example


def _variables(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _environment(node: Cluster) -> dict[str, str]:
    """KUBECONFIG, and the cluster's programs and ours on the PATH."""
    path = f"{programs.binaries()}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "KUBECONFIG": str(node.kubeconfig), "PATH": path}
