"""The chart on the real API server, by the real helm: install, upgrade, rollback and uninstall lose and leave nothing.

No pod runs here. What the hook before an uninstall does is done by its ServiceAccount with its rights, and its pod is
told to have succeeded, which is all that a kubelet would add.
"""

import base64
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from tests.chart.chart import CHART, helm
from tests.cluster.access import Api, ApiError, Json, succeeds
from tests.cluster.control_plane import ControlPlane
from tests.cluster.fixtures import own_control_plane
from tests.support.wait import wait_until

from updraft_operator.api import names

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
APPS = "/apis/apps/v1/namespaces"
_FLEETING = {"events", "apiservices", "leases"}
"""Written by Kubernetes itself, at any time."""


class Thing(NamedTuple):
    """An object of the cluster."""

    resource: str
    namespace: str
    name: str


class Site(NamedTuple):
    """A namespace to install into, of a cluster of one's own."""

    cluster: ControlPlane
    api: Api
    namespace: str

    def helm(self, *words: str | Path) -> str:
        result = helm(*words, "--namespace", self.namespace, kubeconfig=self.cluster.kubeconfig)
        assert result.returncode == 0, result.stderr
        return result.stdout

    @property
    def deployment(self) -> str:
        return f"{APPS}/{self.namespace}/deployments/updraft-operator"

    @property
    def secrets(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/secrets"

    @property
    def speculators(self) -> str:
        return f"/apis/{names.API_VERSION}/namespaces/{self.namespace}/{names.SPECULATORS}"

    def password(self) -> str:
        return base64.b64decode(self.api.get(f"{self.secrets}/updraft-redis")["data"]["password"]).decode()

    def speculator(self, name: str, **metadata: object) -> Json:
        wait_until(lambda: succeeds(lambda: self.api.get(self.speculators)), what="the API of the CRD")
        body = {
            "apiVersion": names.API_VERSION,
            "kind": "AdaptiveSpeculator",
            "metadata": {"name": name, **metadata},
            "spec": {"targetModel": {"uri": "/models/any"}},
        }
        return self.api.create(self.speculators, body)


@pytest.fixture
def cluster() -> Iterator[ControlPlane]:
    """A new one: CRDs are everyone's, and an API server may take minutes to end one that has just been applied."""
    with own_control_plane("kube-controller-manager", "helm") as running:
        yield running


@pytest.fixture
def site(cluster: ControlPlane) -> Iterator[Site]:
    """A namespace of a cluster that has never seen our chart."""
    with cluster.api() as api:
        namespace = f"test-{secrets.token_hex(4)}"
        api.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
        api.get(f"/api/v1/namespaces/{namespace}")
        root = f"/api/v1/namespaces/{namespace}/configmaps/kube-root-ca.crt"
        wait_until(lambda: api.exists(root) and api.exists(f"/api/v1/namespaces/{namespace}/serviceaccounts/default"))
        yield Site(cluster, api, namespace)


@pytest.fixture
def previous(tmp_path: Path) -> Path:
    """The chart as an earlier version would have been: another number, and a CRD that lacks a field."""
    folder = tmp_path / "updraft"
    shutil.copytree(CHART, folder)
    chart = yaml.safe_load((folder / "Chart.yaml").read_text()) | {"version": "0.0.1"}
    (folder / "Chart.yaml").write_text(yaml.safe_dump(chart))
    (path,) = (folder / "files" / "crds").glob(f"{names.SPECULATORS}*")
    crd = yaml.safe_load(path.read_text())
    spec = _spec_of(crd)
    del spec["properties"]["suspend"]
    spec["x-kubernetes-validations"] = [
        rule for rule in spec["x-kubernetes-validations"] if "suspend" not in rule["rule"]
    ]
    path.write_text(yaml.safe_dump(crd))
    return folder


def _spec_of(crd: Json) -> Json:
    schema: Json = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return schema


def _crds(api: Api) -> set[str]:
    found = {item["metadata"]["name"] for item in api.get(CRDS)["items"]}
    return {name for name in found if name.endswith(f".{names.GROUP}")}


def _everything(api: Api) -> set[Thing]:
    found: set[Thing] = set()

    def is_listed() -> bool:
        """Not while a custom resource comes or goes."""
        try:
            found.clear()
            found.update(_listed(api))
        except ApiError:
            return False
        return True

    wait_until(is_listed, what="a listing of all there is")
    return found


def _listed(api: Api) -> Iterator[Thing]:
    groups = [version["groupVersion"] for group in api.get("/apis")["groups"] for version in group["versions"][:1]]
    for prefix in ("/api/v1", *(f"/apis/{group}" for group in groups)):
        for resource in api.get(prefix)["resources"]:
            if "list" not in resource["verbs"] or resource["name"] in _FLEETING:
                continue
            for item in api.get(f"{prefix}/{resource['name']}")["items"]:
                metadata = item["metadata"]
                yield Thing(resource["name"], metadata.get("namespace", ""), metadata["name"])


def test_upgrade_rollback_and_uninstall_lose_no_resource_and_leave_only_the_crds(site: Site, previous: Path) -> None:
    before = _everything(site.api)

    site.helm("install", "updraft", previous)
    password, uid = site.password(), site.speculator("chat")["metadata"]["uid"]
    assert len(password) == 32

    site.helm("upgrade", "updraft", CHART, "--set", "replicas=3,redis.maxMemory=512mb")
    assert site.api.get(site.deployment)["spec"]["replicas"] == 3
    assert site.password() == password
    upgraded = _spec_of(site.api.get(f"{CRDS}/{names.SPECULATORS}.{names.GROUP}"))
    assert "suspend" in upgraded["properties"], "the CRD is upgraded"
    assert site.api.patch(f"{site.speculators}/chat", {"spec": {"suspend": True}})["spec"]["suspend"] is True

    site.helm("rollback", "updraft", "1")
    assert site.api.get(site.deployment)["spec"]["replicas"] == 2
    assert site.password() == password
    assert site.api.get(f"{site.speculators}/chat")["metadata"]["uid"] == uid

    site.helm("upgrade", "updraft", CHART, "--set", "uninstall.releaseFinalizers=false")
    site.helm("uninstall", "updraft")

    kept = {
        Thing("customresourcedefinitions", "", f"{plural}.{names.GROUP}")
        for plural in (names.SPECULATORS, names.DRAFT_VERSIONS, names.DRAFT_IMPORTS)
    }
    expected = before | kept | {Thing(names.SPECULATORS, site.namespace, "chat")}
    wait_until(lambda: _everything(site.api) == expected, what="nothing left but the CRDs and the resource")
    assert not site.api.get(f"/apis/coordination.k8s.io/v1/namespaces/{site.namespace}/leases")["items"]
    assert site.api.get(f"{site.speculators}/chat")["metadata"]["uid"] == uid


def test_a_new_install_takes_the_kept_crds_over(site: Site) -> None:
    words = ("updraft", CHART, "--set", "uninstall.releaseFinalizers=false,redis.enabled=false")
    site.helm("install", *words)
    uid = site.speculator("chat")["metadata"]["uid"]
    site.helm("uninstall", "updraft")

    site.helm("install", *words)

    assert site.api.get(f"{site.speculators}/chat")["metadata"]["uid"] == uid
    site.helm("uninstall", "updraft")


def test_the_hook_has_the_rights_that_it_needs_and_leaves_nothing(site: Site) -> None:
    before = _everything(site.api)
    site.helm("install", "updraft", CHART)
    site.speculator("chat", finalizers=[names.FINALIZER])

    with ThreadPoolExecutor() as pool:
        uninstall = pool.submit(site.helm, "uninstall", "updraft")
        wait_until(lambda: uninstall.done() or bool(_hook_pods(site)), what="the hook's pod", timeout_s=30)
        account = f"system:serviceaccount:{site.namespace}:updraft-operator-release"
        with site.cluster.api(user=account, groups=("system:authenticated",)) as hook:
            hook.patch(f"{site.deployment}/scale", {"spec": {"replicas": 0}})
            wait_until(lambda: not hook.get(site.deployment)["status"].get("replicas"), what="the operator's end")
            (found,) = hook.get(f"/apis/{names.API_VERSION}/{names.SPECULATORS}")["items"]
            hook.patch(f"{site.speculators}/{found['metadata']['name']}", {"metadata": {"finalizers": None}})
            with pytest.raises(ApiError, match="forbidden"):
                hook.get(site.secrets)
        _succeed(site)
        uninstall.result(timeout=60)

    site.api.delete(f"{site.speculators}/chat")
    wait_until(lambda: not site.api.exists(f"{site.speculators}/chat"), what="a deletion that nothing holds up")
    kept = {Thing("customresourcedefinitions", "", crd) for crd in _crds(site.api)}
    wait_until(lambda: _everything(site.api) == before | kept, what="nothing left but the CRDs")


def _hook_pods(site: Site) -> list[Json]:
    query = {"labelSelector": "app.kubernetes.io/name=updraft-release"}
    items: list[Json] = site.api.get(f"/api/v1/namespaces/{site.namespace}/pods", **query)["items"]
    return items


def _succeed(site: Site) -> None:
    """What a kubelet would say of the hook's pod."""
    (pod,) = _hook_pods(site)
    site.api.patch(
        f"/api/v1/namespaces/{site.namespace}/pods/{pod['metadata']['name']}/status",
        {"status": {"phase": "Succeeded", "conditions": []}},
    )


def test_who_may_edit_a_namespace_may_pin_a_version_there_and_who_may_view_it_may_not(site: Site) -> None:
    site.helm("install", "updraft", CHART, "--set", "uninstall.releaseFinalizers=false,redis.enabled=false")
    site.speculator("chat")
    bindings = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{site.namespace}/rolebindings"
    for user, role in (("ann", "edit"), ("bob", "view")):
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role}
        subjects = [{"kind": "User", "name": user}]
        site.api.create(bindings, {"metadata": {"name": user}, "roleRef": reference, "subjects": subjects})
    chat = f"{site.speculators}/chat"

    with site.cluster.api(user="ann") as ann, site.cluster.api(user="bob") as bob:
        wait_until(lambda: succeeds(lambda: ann.get(chat)) and succeeds(lambda: bob.get(chat)), what="the roles")
        pin = {"spec": {"rollout": {"pinnedVersion": "NoDraft"}}}
        wait_until(lambda: succeeds(lambda: ann.patch(chat, pin)), what="the right to edit")
        with pytest.raises(ApiError, match="forbidden"):
            bob.patch(chat, pin)
        with pytest.raises(ApiError, match="forbidden"):
            ann.patch(f"{chat}/status", {"status": {}})


def test_who_administers_a_namespace_installs_an_operator_for_it(site: Site) -> None:
    """What the cluster shares was put there by somebody else."""
    team = f"{site.namespace}-team"
    site.api.create("/api/v1/namespaces", {"metadata": {"name": team}})
    site.cluster.kubectl("apply", "--server-side", "-f", str(CHART / "files" / "crds"))
    roles = site.helm("template", "updraft", CHART, "--show-only", "templates/rbac/aggregate.yaml")
    site.cluster.kubectl("apply", "--server-side", "-f", "-", stdin=roles)
    for namespace in (site.namespace, team):
        site.cluster.kubectl("-n", namespace, "create", "rolebinding", "ann", "--clusterrole=admin", "--user=ann")
    there = f"/apis/{names.API_VERSION}/namespaces/{team}/{names.SPECULATORS}"
    with site.cluster.api(user="ann") as ann:
        wait_until(lambda: succeeds(lambda: ann.get(there)), what="the right of an administrator")
        wait_until(lambda: succeeds(lambda: ann.get(site.secrets)), what="the right of an administrator")

    values = f"watchNamespaces={{{team}}},crds.install=false,rbac.aggregate=false"
    site.helm("install", "updraft", CHART, "--set", values, "--kube-as-user", "ann")

    account = f"system:serviceaccount:{site.namespace}:updraft-operator"
    with site.cluster.api(user=account, groups=("system:authenticated",)) as operator:
        wait_until(lambda: succeeds(lambda: operator.get(there)), what="the operator's role")
        for elsewhere in (site.speculators, f"/apis/{names.API_VERSION}/{names.SPECULATORS}", site.secrets):
            with pytest.raises(ApiError, match="forbidden"):
                operator.get(elsewhere)
