"""The operator may do what is listed here and nothing else; every right has its reason beside it."""

from collections.abc import Mapping

import pytest
from tests.chart.chart import CHART, NAMESPACE, Document, of_kind, one, refusal, rendered, title

from updraft_operator.api import names
from updraft_operator.manifests.redis import OURS, secret_name
from updraft_operator.manifests.redis_users import Role
from updraft_operator.manifests.tls.objects import secret_name as certificate_name

Rights = set[tuple[str, str, str]]
_READ = ("get", "list", "watch")
_KEEP = (*_READ, "create", "patch")
_OWN = (*_KEEP, "delete")

LWS = ("leaderworkerset.x-k8s.io", "leaderworkersets")
WORK = {
    ("updraft.dev", "adaptivespeculators"): (*_READ, "patch"),
    ("updraft.dev", "adaptivespeculators/status"): ("patch",),
    ("updraft.dev", "adaptivespeculators/finalizers"): ("update",),
    ("updraft.dev", "draftversions"): _OWN,
    ("updraft.dev", "draftversions/status"): ("patch",),
    ("updraft.dev", "draftimports"): _KEEP,
    ("updraft.dev", "draftimports/status"): ("patch",),
    ("updraft.dev", "draftimports/finalizers"): ("update",),
    ("apps", "deployments"): _OWN,
    ("apps", "statefulsets"): _OWN,
    LWS: _OWN,
    ("policy", "poddisruptionbudgets"): _KEEP,
    ("networking.k8s.io", "networkpolicies"): _OWN,
    ("", "services"): _OWN,
    ("", "configmaps"): _OWN,
    ("", "serviceaccounts"): _KEEP,
    ("", "persistentvolumeclaims"): _KEEP,
    ("batch", "jobs"): _OWN,
    ("", "pods"): (*_READ, "delete"),
    ("", "secrets"): ("get", "create", "patch"),
    ("", "events"): ("create",),
}
TOKEN: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("", "serviceaccounts/token"): ("create",),
    ("", "namespaces"): ("get",),
    ("", "secrets"): ("get", "patch"),
}
CERTIFICATES: Mapping[tuple[str, str], tuple[str, ...]] = {("", "secrets"): ("get", "patch")}
LEASE: Mapping[tuple[str, str], tuple[str, ...]] = {("coordination.k8s.io", "leases"): ("get", "create", "update")}
RELEASE = {("updraft.dev", "adaptivespeculators"): ("get", "list", "patch")}
STOP = {("apps", "deployments"): ("get",), ("apps", "deployments/scale"): ("patch",)}


def _rights(role: Document) -> Rights:
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def _listed(wanted: Mapping[tuple[str, str], tuple[str, ...]]) -> Rights:
    return {(group, resource, verb) for (group, resource), verbs in wanted.items() for verb in verbs}


def _granted(case: str, account: str, *words: str) -> dict[str, Rights]:
    """Rights of a ServiceAccount by namespace; "" is the whole cluster. `words` as for `rendered`."""
    documents = rendered(case, *words)
    granted: dict[str, Rights] = {}
    for binding in of_kind(documents, "RoleBinding", "ClusterRoleBinding"):
        if account not in [subject["name"] for subject in binding["subjects"]]:
            continue
        assert binding["subjects"][0]["namespace"] == NAMESPACE
        is_shared = binding["kind"] == "ClusterRoleBinding"
        where = "" if is_shared else binding["metadata"].get("namespace", NAMESPACE)
        (role,) = [
            role
            for role in of_kind(documents, binding["roleRef"]["kind"])
            if role["metadata"]["name"] == binding["roleRef"]["name"]
            and (is_shared or role["metadata"].get("namespace", NAMESPACE) == where)
        ]
        granted[where] = granted.get(where, set()) | _rights(role)
    return granted


def test_the_operator_has_the_listed_rights_in_the_cluster_and_its_lease() -> None:
    assert _granted("default", "updraft-operator") == {"": _listed(WORK), NAMESPACE: _listed({**LEASE, **TOKEN})}


def test_the_operator_of_some_namespaces_has_them_there_and_nowhere_else() -> None:
    assert _granted("namespaced", "updraft-operator", "--api-versions", f"{LWS[0]}/v1") == {
        "team-a": _listed(WORK),
        "team-b": _listed(WORK),
        NAMESPACE: _listed({**LEASE, **TOKEN}) | _listed(CERTIFICATES),
    }


def test_there_it_has_no_rights_to_an_api_that_the_cluster_does_not_serve() -> None:
    served = _listed({resource: verbs for resource, verbs in WORK.items() if resource != LWS})
    assert _granted("namespaced", "updraft-operator") == {
        "team-a": served,
        "team-b": served,
        NAMESPACE: _listed({**LEASE, **TOKEN}) | _listed(CERTIFICATES),
    }


def test_without_an_election_there_is_no_right_to_a_lease() -> None:
    assert _granted("small", "updraft-operator") == {"": _listed(WORK), NAMESPACE: _listed(TOKEN)}
    assert not of_kind(rendered("small"), "Lease")


@pytest.mark.attack(
    boundary="operator",
    attack="an operator that requests tokens of other accounts",
    outcome="its role names its own account only",
)
def test_the_operator_gets_tokens_of_its_own_account_only() -> None:
    rule, *_ = one(rendered("default"), "Role", "updraft-operator-token")["rules"]

    account = one(rendered("default"), "ServiceAccount", "updraft-operator")
    assert rule["resourceNames"] == [account["metadata"]["name"]]
    operator = one(rendered("default"), "Deployment", "updraft-operator")["spec"]["template"]["spec"]
    env = {each["name"]: each.get("value") for each in operator["containers"][0]["env"]}
    assert env["UPDRAFT_OPERATOR_SERVICE_ACCOUNT"] == operator["serviceAccountName"] == account["metadata"]["name"]


def test_the_operator_reads_its_own_namespace_only() -> None:
    _, rule, *_ = one(rendered("default"), "Role", "updraft-operator-token")["rules"]
    assert (rule["resources"], rule["resourceNames"]) == (["namespaces"], [NAMESPACE])


@pytest.mark.attack(
    boundary="operator",
    attack="an operator without a Redis of its own or dedicated ones, which signs no certificates, that writes Secrets",
    outcome="it has no right to",
)
def test_without_a_redis_of_its_own_the_operator_writes_no_secret() -> None:
    granted = _granted("no-redis", "updraft-operator", "--set", "tls.mode=Disabled")
    assert {right for right in granted[""] if right[1] == "secrets"} == {("", "secrets", "get")}
    assert not [right for right in granted[NAMESPACE] if right[1] == "secrets"]


def test_the_operator_changes_no_secret_of_its_own_namespace_but_its_ca() -> None:
    role = one(rendered("namespaced"), "Role", "updraft-operator-certificates")
    operator = one(rendered("namespaced"), "Deployment", "updraft-operator")["spec"]["template"]["spec"]
    env = {each["name"]: each.get("value") for each in operator["containers"][0]["env"]}
    own = [env["UPDRAFT_OPERATOR_TLS_CA_SECRET"], env["UPDRAFT_OPERATOR_REDIS_TLS_SECRET"]]
    assert [(rule["verbs"], rule["resourceNames"]) for rule in role["rules"]] == [
        (["get", "patch"], [name]) for name in own
    ]
    assert all("data" not in one(rendered("namespaced"), "Secret", name) for name in own), (
        "an upgrade must not empty them"
    )
    watched = ("--set", "watchNamespaces={team-a,updraft-system}")
    assert not [
        each for each in of_kind(rendered("default", *watched), "Role") if title(each).endswith("-certificates")
    ]


_WITH_CERT_MANAGER = ("--set", "tls.mode=CertManager,tls.issuer.name=corporate")


def test_with_cert_manager_it_reads_the_certificate_of_redis() -> None:
    (rule,) = one(rendered("namespaced", *_WITH_CERT_MANAGER), "Role", "updraft-operator-certificates")["rules"]
    assert (rule["verbs"], rule["resourceNames"]) == (["get"], ["updraft-redis-cert-manager"])


def test_with_cert_manager_the_operator_requests_certificates_and_signs_none() -> None:
    certificates = {("cert-manager.io", "certificates"): _OWN}
    assert _granted("default", "updraft-operator", *_WITH_CERT_MANAGER)[""] == _listed({**WORK, **certificates})
    granted = _granted("no-redis", "updraft-operator", *_WITH_CERT_MANAGER)[""]
    assert {right for right in granted if right[1] == "secrets"} == {("", "secrets", "get")}


def test_the_operator_fills_the_empty_secret_for_the_key_of_dedicated_redis() -> None:
    *_, rule = one(rendered("default"), "Role", "updraft-operator-token")["rules"]
    operator = one(rendered("default"), "Deployment", "updraft-operator")["spec"]["template"]["spec"]
    env = {each["name"]: each.get("value") for each in operator["containers"][0]["env"]}
    name = env["UPDRAFT_OPERATOR_REDIS_KEY_SECRET"]
    assert (rule["resources"], rule["verbs"], rule["resourceNames"]) == (["secrets"], ["get", "patch"], [name])
    assert "data" not in one(rendered("default"), "Secret", name)


_NAMES_ALONE = "rbac.secrets.byName=true"
_BY_NAME = ("--set", f"{_NAMES_ALONE},rbac.secrets.ofSpeculators={{chat,code}},rbac.secrets.named={{clients,chat-tls}}")


def _own_secrets(speculator: str) -> set[str]:
    """What the operator makes for a resource, by its code."""
    of_roles = {secret_name(speculator, role, place) for place in OURS for role in Role}
    return of_roles | {certificate_name(speculator, part) for part in (names.REGISTRY, names.REDIS, names.METRICS)}


def test_the_right_on_secrets_can_be_restricted_to_what_users_name_and_the_operator_makes_for_it() -> None:
    for case, kind in (("default", "ClusterRole"), ("namespaced", "Role")):
        roles = [
            role
            for role in of_kind(rendered(case, *_BY_NAME), kind)
            if any(rule["resources"] == ["adaptivespeculators/status"] for rule in role["rules"])
            and "aggregate" not in str(role["metadata"]["labels"])
        ]
        assert roles
        own = _own_secrets("chat") | _own_secrets("code")
        for role in roles:
            rules = [rule for rule in role["rules"] if rule["resources"] == ["secrets"]]
            named = {tuple(rule["verbs"]): set(rule.get("resourceNames", ())) for rule in rules}
            assert named == {("get",): own | {"clients", "chat-tls"}, ("create", "patch"): own}


def test_an_operator_with_names_still_has_its_own_secrets() -> None:
    role = one(rendered("default", *_BY_NAME), "Role", "updraft-operator-certificates")
    assert [rule["resourceNames"] for rule in role["rules"]] == [["updraft-ca"], ["updraft-redis-tls"]]
    nothing = ("--set", f"{_NAMES_ALONE},rbac.secrets.ofSpeculators={{chat}}", *_WITH_CERT_MANAGER)
    granted = _granted("no-redis", "updraft-operator", *nothing)[""]
    assert {right for right in granted if right[1] == "secrets"} == {("", "secrets", "get")}


def test_empty_lists_of_names_allow_no_secret_and_names_that_restrict_nothing_are_refused() -> None:
    granted = _granted("default", "updraft-operator", "--set", _NAMES_ALONE)[""]
    assert not {right for right in granted if right[1] == "secrets"}
    for names_only in ("named={clients}", "ofSpeculators={chat}"):
        assert "set rbac.secrets.byName" in refusal("--set", f"rbac.secrets.{names_only}")
    null = _granted("default", "updraft-operator", "--set", "rbac.secrets=null")
    assert null == _granted("default", "updraft-operator"), "as with the values of an earlier chart"


def test_the_operator_may_change_its_own_lease_only() -> None:
    role = one(rendered("default"), "Role", "updraft-operator-lease")

    lease = one(rendered("default"), "Lease", "updraft-operator")
    assert [rule.get("resourceNames") for rule in role["rules"]] == [None, [lease["metadata"]["name"]]]
    assert role["rules"][0]["verbs"] == ["create"], "which cannot be restricted to a name"


@pytest.mark.parametrize(("case", "places"), [("default", [""]), ("namespaced", ["team-a", "team-b"])])
def test_the_hook_may_stop_the_operator_and_take_off_finalizers(case: str, places: list[str]) -> None:
    granted = _granted(case, "updraft-operator-release")

    assert granted == {**{place: _listed(RELEASE) for place in places}, NAMESPACE: _listed(STOP)}
    role = one(rendered(case), "Role", "updraft-operator-release")
    assert all(rule["resourceNames"] == ["updraft-operator"] for rule in role["rules"])


def test_the_hook_and_its_rights_go_once_it_is_done() -> None:
    for document in rendered("default"):
        annotations = document["metadata"].get("annotations", {})
        if document["metadata"]["labels"].get("app.kubernetes.io/name") == "updraft-release":
            assert annotations["helm.sh/hook"] == "pre-delete", title(document)
            assert annotations["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded", title(document)
            is_job = document["kind"] == "Job"
            assert int(annotations["helm.sh/hook-weight"]) == (0 if is_job else -10), title(document)


def test_the_test_pod_may_nothing() -> None:
    assert _granted("default", "updraft-test") == {}


def test_nothing_uses_wildcards() -> None:
    for role in of_kind(rendered("default"), "Role", "ClusterRole"):
        assert not any("*" in each for right in _rights(role) for each in right), title(role)


def test_the_roles_of_kubernetes_reach_all_kinds() -> None:
    documents = rendered("default")
    roles = {
        name: one(documents, "ClusterRole", f"updraft-system-updraft-{name}") for name in ("view", "edit", "admin")
    }

    for name, role in roles.items():
        assert role["metadata"]["labels"][f"rbac.authorization.k8s.io/aggregate-to-{name}"] == "true"
    seen, changed = _rights(roles["view"]), _rights(roles["edit"])
    writes = ("create", "update", "patch", "delete", "deletecollection")
    for kind, verbs in (("adaptivespeculators", writes), ("draftimports", writes), ("draftversions", writes[1:3])):
        assert {("updraft.dev", kind, verb) for verb in _READ} <= seen
        assert {(resource, verb) for _, resource, verb in changed if resource == kind} == {
            (kind, verb) for verb in verbs
        }
    assert {verb for _, _, verb in seen} == set(_READ), "who may view changes nothing"
    assert ("updraft.dev", "adaptivespeculators/scale", "patch") in changed
    assert not any(resource.endswith("/status") for _, resource, _ in changed)


def test_every_rule_has_a_comment_that_says_why() -> None:
    for path in (*sorted((CHART / "templates" / "rbac").iterdir()), CHART / "templates" / "_rules.tpl"):
        lines = path.read_text().splitlines()
        first = {number for number, line in enumerate(lines) if line.strip().startswith("- apiGroups:")}
        assert first or path.name == "operator.yaml", path.name
        for number in first:
            rule_before = lines[number - 1].strip().startswith("verbs:") and path.name == "lease.yaml"
            assert lines[number - 1].strip().startswith("#") or rule_before, f"{path.name}:{number + 1}"


def test_ones_own_roles_are_possible() -> None:
    documents = rendered("default", "--set", "rbac.create=false")

    bindings = of_kind(documents, "RoleBinding", "ClusterRoleBinding")
    assert "updraft-operator" not in {binding["subjects"][0]["name"] for binding in bindings}
