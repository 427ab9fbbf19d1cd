"""A Deployment of stock vLLM that nobody made through Updraft, for the tour's sections about attached pods.

There is no image of vLLM here. The server's container has the machine's own programs, and the virtual environment of
tests/vllm in them, on volumes; its command and arguments are those of vLLM's image.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from tests.cluster import updraft_images
from tests.cluster.access import Api, Json
from tests.cluster.programs import CHECKOUT
from tests.cluster.tours import Tour, Traffic, requests
from tests.support.trainer import FAST
from tests.support.wait import wait_until
from tests.vllm import build, models

_LABELS = {"app": "vllm"}
_DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"
_SPECULATOR = "/apis/updraft.dev/v1alpha1/namespaces/default/adaptivespeculators/chat"
_VARIABLES = {
    "HOME": "/tmp",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def obstacle() -> str:
    """Why there can be none here; empty if there can."""
    return "" if build.is_built() else "stock vLLM is not installed; run `make vllm-build`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm:
    """The Deployment, and its owner's view of it."""

    tour: Tour
    api: Api

    @contextmanager
    def running(self) -> Iterator[None]:
        """Its owner runs it, and has the page's resource about it."""
        target = models.write_target(self.tour.node.folder / "volumes" / "models" / "chat")
        for file in target.iterdir():
            file.chmod(0o644)
        _write_example(self.tour.folder / "examples" / "attach-vllm.yaml")
        self.api.create(_DEPLOYMENTS, _deployment())
        try:
            self.tour.shell("kubectl rollout status deployment/vllm --timeout=10m")
            yield
        finally:
            self.tour.shell("kubectl delete deployment vllm --cascade=foreground --wait")

    def pods(self) -> list[Json]:
        found = self.api.get("/api/v1/namespaces/default/pods", labelSelector="app=vllm")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def uids(self) -> set[str]:
        return {pod["metadata"]["uid"] for pod in self.pods()}

    def template(self) -> Json:
        """The Deployment's pod template."""
        template: Json = self.api.get(f"{_DEPLOYMENTS}/vllm")["spec"]["template"]
        return template

    @contextmanager
    def traffic(self) -> Iterator[Traffic]:
        """Requests without end to the server's own port."""
        (pod,) = self.pods()
        with requests(self.tour, f"http://{pod['status']['podIP']}:8000", model="chat") as answers:
            yield answers

    def attached(self) -> tuple[str, str]:
        """Status and reason of condition Attached."""
        conditions = self._status().get("conditions", ())
        return next(((each["status"], each["reason"]) for each in conditions if each["type"] == "Attached"), ("", ""))

    def wait_for_a_version(self) -> None:
        """Until vLLM itself reports one of the trainer's."""
        try:
            wait_until(self._is_drafting, timeout_s=300)
        except TimeoutError:
            raise AssertionError(f"no version is served\n{self.tour.state()}") from None

    def _is_drafting(self) -> bool:
        status = self._status()
        return bool(status.get("serving", {}).get("updatedReplicas") and status.get("versions", {}).get("stable"))

    def _status(self) -> Json:
        status: Json = self.api.get(_SPECULATOR).get("status", {})
        return status

    def made_by_the_operator(self) -> list[str]:
        kinds = "deployments,statefulsets,services,configmaps,secrets,serviceaccounts,pdb,netpol"
        return self.tour.shell(f"kubectl get {kinds} -l updraft.dev/speculator=chat -o name").split()


def _write_example(path: Path) -> None:
    """The page's own file, for a model on a volume that is trained in seconds."""
    example = yaml.safe_load((CHECKOUT / "examples" / path.name).read_text())
    spec = example["spec"]
    spec["targetModel"]["uri"] = "pvc://models/chat"
    spec["draft"] = {"vocabSize": 128}
    # No pod of the tour requests CPUs. One that did would leave none to the others while it computes.
    spec["serving"]["attached"]["resources"] = {"requests": {}}
    quick = {name: value for name, value in FAST.items() if "VOCAB" not in name}
    spec["trainer"] = {"env": [{"name": name, "value": value} for name, value in quick.items()]}
    spec["rollout"] = {"strategy": "Immediate"}
    path.write_text(yaml.safe_dump(example))


def _deployment() -> Json:
    """As its owner wrote it; a new pod waits for the end of the old one, for there is room for one."""
    server = {
        "name": "vllm",
        "image": updraft_images.reference("inference"),
        "command": [str(build.python()), "-m", "vllm.entrypoints.openai.api_server"],
        "args": [
            *("--model", "/models/chat", "--served-model-name", "chat", "--host", "0.0.0.0", "--port", "8000"),  # noqa: S104 - of a pod
            *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"),
        ],
        "env": [{"name": name, "value": value} for name, value in _VARIABLES.items()],
        "securityContext": {"runAsUser": 0},
        "ports": [{"name": "http", "containerPort": 8000}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 2, "timeoutSeconds": 10},
        "volumeMounts": [
            {"name": "models", "mountPath": "/models", "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},  # vLLM's processes share memory
            *({"name": _volume(path), "mountPath": path, "readOnly": True} for path in _machine()),
        ],
    }
    volumes: list[Json] = [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}]
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    volumes += [{"name": _volume(path), "hostPath": {"path": path}} for path in _machine()]
    template = {
        "metadata": {"labels": _LABELS},
        "spec": {"containers": [server], "volumes": volumes, "terminationGracePeriodSeconds": 5},
    }
    spec = {"selector": {"matchLabels": _LABELS}, "strategy": {"type": "Recreate"}, "template": template}
    return {"metadata": {"name": "vllm"}, "spec": spec}


def _machine() -> list[str]:
    """Folders of this machine that vLLM's environment needs: programs and libraries, the environment, and its Python."""
    environment = build.python().parents[1]
    return ["/usr", str(environment), str(Path(os.path.realpath(build.python())).parents[1])]


def _volume(path: str) -> str:
    return f"machine-{_machine().index(path)}"
