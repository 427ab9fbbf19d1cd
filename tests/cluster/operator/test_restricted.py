"""A namespace as OpenShift and a strict platform team make it: everything that the operator and the chart make is admitted.

The real API server admits or refuses; OpenShift's SCC is imitated by ValidatingAdmissionPolicies in restricted.yaml.
"""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.chart.chart import rendered
from tests.cluster.access import Api, ApiError, succeeds
from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import Subject
from tests.support.wait import wait_until

from updraft_operator.api import names

POLICIES = Path(__file__).with_name("restricted.yaml")
LABELLED = {"podTemplate": {"metadata": {"labels": {"team": "search"}}}}
BARE: dict[str, Any] = {"metadata": {"name": "bare"}, "spec": {"containers": [{"name": "a", "image": "a:1"}]}}


@pytest.fixture(scope="module")
def settings() -> dict[str, object]:
    """As the chart sets it on OpenShift."""
    return {"fixed_user": False}


@pytest.fixture(scope="module")
def policies(kubernetes: ControlPlane) -> Iterator[None]:
    kubernetes.kubectl("apply", "-f", str(POLICIES))
    yield
    kubernetes.kubectl("delete", "-f", str(POLICIES), "--wait=false")


@pytest.fixture
def strict(api: Api, policies: None) -> Iterator[str]:
    """A namespace with these policies, a quota, and the defaults that a quota needs, in force."""
    name = f"test-{secrets.token_hex(4)}"
    api.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": {"strict": "yes"}}})
    hard = {"requests.cpu": "64", "requests.memory": "512Gi", "limits.memory": "512Gi", "pods": "50"}
    api.create(f"/api/v1/namespaces/{name}/resourcequotas", {"metadata": {"name": "quota"}, "spec": {"hard": hard}})
    bounds = {
        "type": "Container",
        "default": {"memory": "2Gi"},
        "defaultRequest": {"cpu": "100m", "memory": "256Mi"},
        "max": {"memory": "256Gi"},
    }
    api.create(f"/api/v1/namespaces/{name}/limitranges", {"metadata": {"name": "bounds"}, "spec": {"limits": [bounds]}})
    wait_until(lambda: api.exists(f"/api/v1/namespaces/{name}/serviceaccounts/default"), what="its default account")
    wait_until(lambda: not succeeds(lambda: create(api, name, BARE)), what="policies in force")
    yield name
    api.delete(f"/api/v1/namespaces/{name}")


def create(api: Api, namespace: str, pod: dict[str, Any]) -> None:
    """Ask whether a pod would be admitted; none is made."""
    api.create(f"/api/v1/namespaces/{namespace}/pods?dryRun=All", pod)


@pytest.mark.attack(
    boundary="images",
    attack="OpenShift's restricted-v2, a quota, limits, a required label and read-only roots",
    outcome="the pods of resources are admitted; only SGLang and vLLM need a writable root",
)
@pytest.mark.parametrize("engine", ["Torch", "SGLang", "VLLM"])
def test_everything_of_a_resource_is_admitted(operator: Running, api: Api, strict: str, engine: str) -> None:
    subject = Subject(api, strict, f"asp-{secrets.token_hex(3)}")
    subject.create(engine={"type": engine}, serving=LABELLED, trainer=LABELLED, registry=LABELLED)
    subject.wait_until_built()
    if (
        engine != "Torch"
    ):  # its server writes into its own folders, which an exception of the platform team has to allow
        message = subject.wait_for("Available", "False", "QuotaExceeded")
        assert "the root of every container is read-only" in message
        return
    for part in (names.SERVING, names.TRAINER, names.REGISTRY):
        wait_until(lambda part=part: bool(subject.pods(part)), what=f"a pod of {part}")  # type: ignore[misc] # a default


def test_a_pod_that_names_its_user_is_refused(api: Api, strict: str) -> None:
    sound = {
        "metadata": {"name": "sound", "labels": {"team": "search"}},
        "spec": {
            "containers": [
                {
                    "name": "a",
                    "image": "a:1",
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
            ]
        },
    }
    create(api, strict, sound)
    named = {**sound, "spec": {**sound["spec"], "securityContext": {"runAsUser": 65532}}}  # type: ignore[dict-item] # Json
    with pytest.raises(ApiError, match="restricted-v2 chooses the user"):
        create(api, strict, named)


@pytest.mark.attack(
    boundary="images",
    attack="the same namespace, and the chart",
    outcome="every pod of the chart and of its hooks is admitted with `openshift: true`",
)
def test_every_pod_of_the_chart_is_admitted(api: Api, strict: str) -> None:
    words = ("--set", "openshift=true", "--set", "commonLabels.team=search")
    pods = [pod for content in rendered("default", *words) if (pod := pod_of(content)) is not None]
    assert len(pods) >= 3
    for pod in pods:
        account = pod["spec"].get("serviceAccountName")
        if account and not api.exists(f"/api/v1/namespaces/{strict}/serviceaccounts/{account}"):
            api.create(f"/api/v1/namespaces/{strict}/serviceaccounts", {"metadata": {"name": account}})
        create(api, strict, pod)


def pod_of(content: dict[str, Any]) -> dict[str, Any] | None:
    """The pod of a workload, with a name."""
    spec = content["spec"]["template"] if "template" in content.get("spec", {}) else content
    if content["kind"] != "Pod" and spec is content:
        return None
    metadata = {key: value for key, value in spec.get("metadata", {}).items() if key in {"labels", "annotations"}}
    claims = [each["metadata"]["name"] for each in content.get("spec", {}).get("volumeClaimTemplates", ())]
    claimed = [
        {"name": name, "persistentVolumeClaim": {"claimName": name}} for name in claims
    ]  # as its controller adds them
    volumes = [*spec["spec"].get("volumes", ()), *claimed]
    return {
        "metadata": {**metadata, "name": f"pod-{secrets.token_hex(3)}"},
        "spec": {**spec["spec"], "volumes": volumes},
    }
