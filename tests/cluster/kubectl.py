"""kubectl with the plugin, as an administrator and as somebody who may only look; and a speculator to look at."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster import crds as kinds
from tests.cluster import programs
from tests.cluster.access import Api, Json, succeeds
from tests.cluster.control_plane import ControlPlane
from tests.support import speculator_objects as objects
from tests.support.speculator_objects import moment
from tests.support.wait import wait_until

SPECULATORS, VERSIONS = "adaptivespeculators", "draftversions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a command came to."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubectl:
    """kubectl with the plugin on its PATH, as one user in one namespace."""

    environment: dict[str, str]
    namespace: str
    program: Path = field(default_factory=lambda: programs.path("kubectl"))

    def __call__(self, *words: str) -> Said:
        done = subprocess.run(self.command(*words), env=self.environment, capture_output=True, text=True, check=False)
        return Said(code=done.returncode, out=done.stdout, err=done.stderr)

    def command(self, *words: str) -> list[str]:
        """`kubectl updraft ...` in the namespace; other words of kubectl's are run as they are."""
        is_ours = words[0] == "updraft"
        return [str(self.program), *words, *(["-n", self.namespace] if is_ours and "-A" not in words else [])]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH on which kubectl finds the plugin and its completion."""
    folder = tmp_path_factory.mktemp("path")
    for name, function in (("kubectl-updraft", "main"), ("kubectl_complete-updraft", "complete")):
        script = folder / name
        script.write_text(f"#!{sys.executable}\nfrom updraft_cli import kubectl\nkubectl.{function}()\n")
        script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def as_user(path: str, namespace: str) -> Callable[[Path], Kubectl]:
    def of(kubeconfig: Path) -> Kubectl:
        proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return Kubectl(
            environment={**os.environ, **proxies, "PATH": path, "KUBECONFIG": str(kubeconfig)}, namespace=namespace
        )

    return of


@pytest.fixture
def admin(as_user: Callable[[Path], Kubectl], kubernetes: ControlPlane, crds: None) -> Kubectl:
    return as_user(kubernetes.kubeconfig)


@pytest.fixture
def viewer(
    as_user: Callable[[Path], Kubectl], kubernetes: ControlPlane, api: Api, namespace: str, tmp_path: Path, crds: None
) -> Kubectl:
    """A service account that may look at our kinds, and at nothing else."""
    core, rbac = f"/api/v1/namespaces/{namespace}", f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    api.create(f"{core}/serviceaccounts", {"metadata": {"name": "ann"}})
    rules = [
        {
            "apiGroups": ["updraft.dev"],
            "resources": [SPECULATORS, VERSIONS, "draftimports"],
            "verbs": ["get", "list", "watch"],
        }
    ]
    api.create(f"{rbac}/roles", {"metadata": {"name": "view"}, "rules": rules})
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "view"}
    subject = {"kind": "ServiceAccount", "name": "ann", "namespace": namespace}
    api.create(f"{rbac}/rolebindings", {"metadata": {"name": "view"}, "roleRef": role, "subjects": [subject]})
    token = api.create(f"{core}/serviceaccounts/ann/token", {"spec": {}})["status"]["token"]
    config = yaml.safe_load(kubernetes.kubeconfig.read_text())
    config["users"] = [{"name": "user", "user": {"token": token}}]
    kubeconfig = tmp_path / "ann.kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(config))
    with kubernetes.api(user=f"system:serviceaccount:{namespace}:ann") as ann:
        wait_until(lambda: succeeds(lambda: ann.get(speculators(namespace))), what="the role")
    return as_user(kubeconfig)


def store(api: Api, namespace: str, plural: str, content: Json) -> None:
    """Create an object with its status, as a person and the operator do it between them."""
    collection, name = kinds.collection(namespace, plural), content["metadata"]["name"]
    told = dict(content)
    told["metadata"] = {"name": name}
    made = api.create(collection, told)
    generation = made["metadata"]["generation"]
    status = {**content["status"]}
    if plural == SPECULATORS:
        status["observedGeneration"] = generation
    api.patch(f"{collection}/{name}/status", {"status": status})


@pytest.fixture
def qwen(api: Api, namespace: str, crds: None) -> Callable[[], Json]:
    """A speculator with three versions; call it to read it."""
    store(api, namespace, SPECULATORS, objects.speculator())
    for content in (
        objects.version(
            1, "Superseded", reason="version 2 took over", history=[moment(1, "Stable"), moment(9, "Superseded")]
        ),
        objects.version(
            2, "Stable", reason="it won", pods={"loaded": 2, "target": 2}, history=[moment(8, "Stable", "it won")]
        ),
        objects.version(3, "Rejected", reason="too slow"),
        objects.version(4, "Held", reason="it waits"),
        objects.version(1, "Stable", owner="other"),
    ):
        store(api, namespace, VERSIONS, content)
    return lambda: api.get(f"{speculators(namespace)}/qwen")


def speculators(namespace: str) -> str:
    return kinds.collection(namespace, SPECULATORS)


def rollout(content: Json) -> Any:
    return content["spec"]["rollout"]
