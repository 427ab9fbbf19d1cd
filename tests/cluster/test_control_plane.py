"""The control plane is the real one: it validates with CEL, denies by RBAC, collects garbage, and writes down who did what."""

import pytest
from tests.cluster.access import Api, ApiError, Json, audited, succeeds
from tests.cluster.control_plane import ControlPlane
from tests.support.wait import wait_until

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
RBAC = "/apis/rbac.authorization.k8s.io/v1"

_WIDGET: Json = {
    "metadata": {"name": "widgets.example.test"},
    "spec": {
        "group": "example.test",
        "scope": "Namespaced",
        "names": {"plural": "widgets", "singular": "widget", "kind": "Widget"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "spec": {
                                "type": "object",
                                "properties": {
                                    "replicas": {"type": "integer"},
                                    "limit": {"type": "integer", "default": 4},
                                },
                                "x-kubernetes-validations": [
                                    {"rule": "self.replicas <= self.limit", "message": "more replicas than the limit"}
                                ],
                            }
                        },
                    }
                },
            }
        ],
    },
}


@pytest.fixture
def widgets(api: Api, namespace: str) -> str:
    """The collection of a custom resource with a rule in CEL."""
    if not api.exists(f"{CRDS}/widgets.example.test"):
        api.create(CRDS, _WIDGET)
    path = f"/apis/example.test/v1/namespaces/{namespace}/widgets"
    wait_until(lambda: succeeds(lambda: api.get(path)), what="the custom resource")
    return path


def _widget(name: str, replicas: int) -> Json:
    return {
        "apiVersion": "example.test/v1",
        "kind": "Widget",
        "metadata": {"name": name},
        "spec": {"replicas": replicas},
    }


def _config_map(name: str, **metadata: object) -> Json:
    return {"metadata": {"name": name, **metadata}}


def test_a_rule_in_cel_refuses_with_its_message_and_sees_defaults(api: Api, widgets: str) -> None:
    with pytest.raises(ApiError, match="more replicas than the limit") as refused:
        api.create(widgets, _widget("too-large", 5))
    assert (refused.value.code, refused.value.reason) == (422, "Invalid")

    assert api.create(widgets, _widget("right", 4))["spec"] == {"replicas": 4, "limit": 4}


def test_a_user_may_do_what_a_role_grants_and_nothing_else(kubernetes: ControlPlane, api: Api, namespace: str) -> None:
    rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list"]}]
    roles = f"{RBAC}/namespaces/{namespace}"
    api.create(f"{roles}/roles", {"metadata": {"name": "reader"}, "rules": rules})
    binding = {
        "metadata": {"name": "reader"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"},
        "subjects": [{"kind": "User", "name": "ann"}],
    }
    api.create(f"{roles}/rolebindings", binding)
    config_maps = f"/api/v1/namespaces/{namespace}/configmaps"

    with kubernetes.api(user="ann") as ann:
        wait_until(lambda: succeeds(lambda: ann.get(config_maps)), what="the role")
        with pytest.raises(ApiError, match='"ann" cannot create resource "configmaps"') as refused:
            ann.create(config_maps, _config_map("mine"))
    assert (refused.value.code, refused.value.reason) == (403, "Forbidden")


def test_the_audit_log_tells_who_did_what_with_which_result(kubernetes: ControlPlane, namespace: str) -> None:
    config_maps = f"/api/v1/namespaces/{namespace}/configmaps"
    with kubernetes.api(user="bob", groups=("system:masters",)) as bob, kubernetes.api(user="eve") as eve:
        bob.create(config_maps, _config_map("his"))
        bob.patch(f"{config_maps}/his", {"data": {"a": "1"}})
        with pytest.raises(ApiError, match="forbidden"):
            eve.delete(f"{config_maps}/his")

    told = [
        (entry.user, entry.verb, entry.resource, entry.name, entry.code)
        for entry in audited(kubernetes.audit_log)
        if entry.namespace == namespace and entry.user in {"bob", "eve"}
    ]
    assert told == [
        ("bob", "create", "configmaps", "his", 201),
        ("bob", "patch", "configmaps", "his", 200),
        ("eve", "delete", "configmaps", "his", 403),
    ]


def test_what_is_applied_by_one_manager_cannot_be_taken_by_another_unforced(api: Api, namespace: str) -> None:
    path = f"/api/v1/namespaces/{namespace}/configmaps/shared"
    body = {"apiVersion": "v1", "kind": "ConfigMap", **_config_map("shared"), "data": {"a": "1"}}
    api.apply(path, body, manager="first")

    with pytest.raises(ApiError, match='conflict with "first"'):
        api.apply(path, {**body, "data": {"a": "2"}}, manager="second")

    assert api.apply(path, {**body, "data": {"a": "2"}}, manager="second", force=True)["data"] == {"a": "2"}


def test_the_controllers_delete_what_its_owner_leaves_behind(
    kubernetes: ControlPlane, api: Api, namespace: str
) -> None:
    if not kubernetes.has_controllers:
        pytest.skip("KUBEBUILDER_ASSETS has no kube-controller-manager: nothing collects garbage")
    config_maps = f"/api/v1/namespaces/{namespace}/configmaps"
    owner = api.create(config_maps, _config_map("owner"))["metadata"]
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner["uid"]}
    api.create(config_maps, _config_map("owned", ownerReferences=[reference]))

    api.delete(f"{config_maps}/owner")

    wait_until(lambda: not api.exists(f"{config_maps}/owned"), what="the collection of garbage")


def test_kubectl_is_the_administrator(kubernetes: ControlPlane, namespace: str) -> None:
    assert kubernetes.kubectl("auth", "whoami", "-o", "jsonpath={.status.userInfo.username}") == "admin"
    assert namespace in kubernetes.kubectl("get", "namespaces", "-o", "name")
