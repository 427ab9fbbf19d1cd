"""Who the operator is: a service account with exactly the rights that the chart gives it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.cluster.access import Api, Json
from tests.cluster.control_plane import ControlPlane

_RULES = Path(__file__).parents[3] / "charts" / "updraft" / "templates" / "_rules.tpl"
_RBAC = "/apis/rbac.authorization.k8s.io/v1"
_LEASES: list[Json] = [
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
    {
        "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"],
        "resourceNames": ["updraft-operator"],
        "verbs": ["get", "update"],
    },
]
_OPERATOR = "updraft-operator"
"""The account whose tokens registries accept. Each operator of a test calls the API server as another one, to be told apart in
the audit log."""

_TOKEN: Json = {
    "apiGroups": [""],
    "resources": ["serviceaccounts/token"],
    "resourceNames": [_OPERATOR],
    "verbs": ["create"],
}
_NAMESPACE: Json = {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["get"]}
"""Of its own one, which the caller names."""

_DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A service account, the name that the audit log has for it, and the way in."""

    namespace: str
    user: str
    kubeconfig: Path


def rules() -> list[Json]:
    """What the chart grants where the operator works, as to an operator of all namespaces."""
    found = re.search(r'define "updraft.rules" -}}(.*?){{/[*]', _RULES.read_text(), re.DOTALL)
    assert found is not None
    listed: list[Json] = yaml.safe_load(re.sub(r"(?m)^{{-.*}}$", "", found[1]))
    return listed


def granted() -> set[tuple[str, str, str]]:
    """Group, resource and verb of all of that, of the Lease, and of the own account's tokens and namespace."""
    return {
        (group, resource, verb)
        for rule in (*rules(), *_LEASES, _TOKEN, _NAMESPACE)
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def account(
    cluster: ControlPlane,
    api: Api,
    folder: Path,
    namespace: str,
    name: str,
    *,
    watched: Sequence[str] = (),
    allowed: Sequence[Json] = (),
    at_home: Sequence[Json] = (),
) -> Account:
    """Make one in `namespace`, with rights in the `watched` namespaces only; none: in all. These are `allowed` instead of
    `rules`, and `at_home` those that it has besides in its own."""
    core = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    held = {each["metadata"]["name"] for each in api.get(core)["items"]}
    for each in sorted({name, _OPERATOR} - held):
        api.create(core, {"metadata": {"name": each}})
    subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    own = {**_NAMESPACE, "resourceNames": [namespace]}
    _bind(api, subject, f"{name}-lease", [*_LEASES, _TOKEN, own, *at_home], namespace)
    for where in watched or ("",):
        _bind(api, subject, f"{namespace}-{name}", [*(allowed or rules())], where)
    token = api.create(f"{core}/{name}/token", {"spec": {"expirationSeconds": _DAY_S}})["status"]["token"]
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    config["users"] = [{"name": "user", "user": {"token": token}}]
    kubeconfig = folder / f"{namespace}-{name}.kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(config))
    return Account(namespace=namespace, user=f"system:serviceaccount:{namespace}:{name}", kubeconfig=kubeconfig)


def _bind(api: Api, subject: Json, name: str, allowed: list[Json], namespace: str) -> None:
    """A role and who has it, in a namespace or ("") everywhere."""
    prefix, kind = (f"{_RBAC}/namespaces/{namespace}", "Role") if namespace else (_RBAC, "ClusterRole")
    plural = f"{kind.lower()}s"
    api.create(f"{prefix}/{plural}", {"metadata": {"name": name}, "rules": allowed})
    role: dict[str, Any] = {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name}
    body = {"metadata": {"name": name}, "roleRef": role, "subjects": [subject]}
    api.create(f"{prefix}/{kind.lower()}bindings", body)
