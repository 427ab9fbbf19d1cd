"""docs/attach.md, command by command, on a real node: a Deployment of stock vLLM that the test made, and that stays its own.

There is no image of vLLM here. The server's container has the machine's own programs, and the virtual environment of
tests/vllm in them, on volumes; its command and arguments are those of vLLM's image.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster import tours, updraft_images
from tests.cluster.access import Api, Json
from tests.cluster.programs import CHECKOUT
from tests.cluster.tours import Tour
from tests.support.trainer import FAST
from tests.support.wait import wait_until
from tests.vllm import build, models

pytestmark = [pytest.mark.timeout(1800), pytest.mark.lasts(400)]

LABELS = {"app": "vllm"}
DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"
SPECULATOR = "/apis/updraft.dev/v1alpha1/namespaces/default/adaptivespeculators/chat"
_VARIABLES = {
    "HOME": "/tmp",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
_ASK = """
import json, sys, urllib.request
url, first, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for start in range(first, first + number):
    prompt = [40 + (start + position) % 50 for position in range(64)]
    body = {"model": "chat", "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    usage = json.load(urllib.request.urlopen(request, timeout=120))["usage"]
    assert usage["completion_tokens"] == 48, usage
"""
_MANY = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tour]:
    """A node with the operator, on which somebody runs vLLM."""
    if why := tours.obstacle():
        pytest.skip(why)
    if not build.is_built():
        pytest.skip("stock vLLM is not installed; run `make vllm-build`")
    with tours.tour(tmp_path_factory.mktemp("attach"), num_volumes=3) as running:
        target = models.write_target(running.node.folder / "volumes" / "models" / "chat")
        for file in target.iterdir():
            file.chmod(0o644)
        _write_example(running.folder / "examples" / "attach-vllm.yaml")
        running.run("Install")
        with running.node.api() as api:
            api.create(DEPLOYMENTS, _deployment())
        yield running


def test_a_vllm_of_somebody_else_is_attached_learns_and_stays_theirs(place: Tour) -> None:
    with place.node.api() as api:
        apply, wait, *attach = tours.section("Attach by hand", "attach")
        place.shell(apply)
        place.shell(wait)
        wait_until(lambda: "NotInjected" in _attached(api), timeout_s=60, what="the condition names what is missing")
        for command in attach:
            place.shell(command)
        (pod,) = _pods(api)
        asked = 0
        while not _served(api):
            assert asked < 400, f"no version is served after {asked} requests\n{place.state()}"
            _ask(place, pod, asked)
            asked += _MANY
        assert _uids(api) == {pod["metadata"]["uid"]}, "nothing restarted for a new draft"
        status = place.shell("kubectl updraft status chat")
        assert "stable" in status

        place.shell("kubectl delete asp chat --wait")
        wait_until(lambda: not _ours(place), timeout_s=120, what="the end of all that the operator made")
        _ask(place, pod, 0)
        assert _uids(api) == {pod["metadata"]["uid"]}, "the workload outlives the AdaptiveSpeculator"


def _write_example(path: Path) -> None:
    """The page's own file, for a model on a volume that is trained in seconds."""
    example = yaml.safe_load((CHECKOUT / "examples" / path.name).read_text())
    spec = example["spec"]
    spec["targetModel"]["uri"] = "pvc://models/chat"
    spec["draft"] = {"vocabSize": 128}
    quick = {name: value for name, value in FAST.items() if "VOCAB" not in name}
    spec["trainer"] = {"env": [{"name": name, "value": value} for name, value in quick.items()]}
    spec["rollout"] = {"strategy": "Immediate"}
    path.write_text(yaml.safe_dump(example))


def _deployment() -> Json:
    """As its owner wrote it; a new pod waits for the end of the old one, for there is room for one."""
    interpreter = build.python()
    server = {
        "name": "vllm",
        "image": updraft_images.reference("inference"),
        "command": [str(interpreter), "-m", "vllm.entrypoints.openai.api_server"],
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
        "metadata": {"labels": LABELS},
        "spec": {"containers": [server], "volumes": volumes, "terminationGracePeriodSeconds": 5},
    }
    spec = {"selector": {"matchLabels": LABELS}, "strategy": {"type": "Recreate"}, "template": template}
    return {"metadata": {"name": "vllm"}, "spec": spec}


def _machine() -> list[str]:
    """Folders of this machine that vLLM's environment needs: programs and libraries, the environment, and its Python."""
    environment = build.python().parents[1]
    return ["/usr", str(environment), str(Path(os.path.realpath(build.python())).parents[1])]


def _volume(path: str) -> str:
    return f"machine-{_machine().index(path)}"


def _ask(place: Tour, pod: Json, start: int) -> None:
    """Some requests to the server's own port, from within the node."""
    url = f"http://{pod['status']['podIP']}:8000/v1/completions"
    place.node.enter(sys.executable, "-c", _ASK, url, str(start), str(_MANY))


def _pods(api: Api) -> list[Json]:
    found = api.get("/api/v1/namespaces/default/pods", labelSelector="app=vllm")["items"]
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


def _uids(api: Api) -> set[str]:
    return {pod["metadata"]["uid"] for pod in _pods(api)}


def _status(api: Api) -> dict[str, Any]:
    return dict(api.get(SPECULATOR).get("status", {}))


def _attached(api: Api) -> str:
    found = [each for each in _status(api).get("conditions", ()) if each["type"] == "Attached"]
    return json.dumps(found)


def _served(api: Api) -> bool:
    """Whether vLLM itself reports a version of the trainer's."""
    return bool(_status(api).get("serving", {}).get("updatedReplicas")) and bool(
        _status(api).get("versions", {}).get("stable")
    )


def _ours(place: Tour) -> list[str]:
    kinds = "deployments,statefulsets,services,configmaps,secrets,serviceaccounts,pdb,netpol"
    return place.shell(f"kubectl get {kinds} -l updraft.dev/speculator=chat -o name").split()
