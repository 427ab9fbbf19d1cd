"""What helm makes of the chart is what Kubernetes takes, hardened, and named so that its parts find each other."""

import functools
import hashlib
import json
from typing import Any

import kubernetes_validate
import pytest
from tests.chart.chart import (
    CASES,
    CHART,
    NAMESPACE,
    RELEASE,
    Document,
    helm,
    of_kind,
    one,
    pods,
    rendered,
    title,
    values,
)

from updraft_chassis import settings
from updraft_operator import commands
from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, Metadata, Spec, TargetModel
from updraft_operator.manifests import network
from updraft_operator.settings import OperatorSettings

VERSIONS = ("1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
OPERATOR_PODS = {"Deployment/updraft-operator", "Job/updraft-operator-release", "Pod/updraft-test"}


def _owner() -> AdaptiveSpeculator:
    spec = Spec(target_model=TargetModel(uri="/models/any"))
    return AdaptiveSpeculator(metadata=Metadata(name="chat", namespace="team-a"), spec=spec)


def _variables(pod: Document) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in pod["containers"][0]["env"]}


def _operator(case: str) -> Document:
    pod: Document = one(rendered(case), "Deployment", "updraft-operator")["spec"]["template"]
    return pod


@pytest.mark.parametrize("case", CASES)
def test_the_chart_has_no_fault_that_lint_finds(case: str) -> None:
    result = helm("lint", "--strict", CHART, "--values", values(case))

    assert result.returncode == 0, result.stdout + result.stderr
    assert "[WARNING]" not in result.stdout


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_document_is_what_kubernetes_knows(case: str, version: str) -> None:
    for document in rendered(case):
        if document["apiVersion"].startswith(("monitoring.coreos.com/", "cert-manager.io/")):
            continue  # of no Kubernetes; test_monitoring.py and test_redis.py look at them
        assert _fault(json.dumps(document), version) == "", title(document)


@functools.cache  # cases share most of their documents, and a look at one takes a tenth of a second
def _fault(document: str, version: str) -> str:
    """Where a document in JSON is not what Kubernetes knows, and why; empty when it is."""
    try:
        kubernetes_validate.validate(json.loads(document), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    return ""


@pytest.mark.parametrize("case", CASES)
def test_no_two_documents_are_one_object(case: str) -> None:
    documents = rendered(case)

    keys = {(title(document), document["metadata"].get("namespace")) for document in documents}

    assert len(keys) == len(documents)


@pytest.mark.parametrize("case", CASES)
def test_every_pod_fulfils_the_restricted_pod_security_standard(case: str) -> None:
    for name, pod in pods(rendered(case)):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert all(volume.keys() - {"name"} <= {"emptyDir", "configMap", "secret"} for volume in pod["volumes"]), name
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name


@pytest.mark.parametrize("case", CASES)
def test_every_pod_has_bounds_and_an_image_with_a_version(case: str) -> None:
    for name, pod in pods(rendered(case)):
        for container in pod["containers"]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), name
            assert "memory" in resources["limits"], name
            assert "@sha256:" in container["image"] or ":" in container["image"].rpartition("/")[2], name
            assert not container["image"].endswith(":latest"), name


@pytest.mark.attack(
    boundary="images",
    attack="a pod of the chart that calls the Kubernetes API",
    outcome="only those that need a token have one",
)
def test_only_who_talks_to_the_api_server_has_a_token() -> None:
    documents = rendered("default")

    with_token = {name for name, pod in pods(documents) if pod["automountServiceAccountToken"]}

    assert with_token == OPERATOR_PODS
    assert all(not account["automountServiceAccountToken"] for account in of_kind(documents, "ServiceAccount"))


@pytest.mark.parametrize("case", CASES)
def test_services_become_no_variables(case: str) -> None:
    """UPDRAFT_OPERATOR_SERVICE_HOST would be a setting that nobody knows, and end the operator."""
    assert all(pod["enableServiceLinks"] is False for _, pod in pods(rendered(case)))


@pytest.mark.parametrize("case", CASES)
def test_who_runs_as_a_service_account_finds_it(case: str) -> None:
    documents = rendered(case)
    accounts = {account["metadata"]["name"] for account in of_kind(documents, "ServiceAccount")}

    named = {pod["serviceAccountName"] for _, pod in pods(documents) if "serviceAccountName" in pod}
    bound = {
        subject["name"]
        for binding in of_kind(documents, "RoleBinding", "ClusterRoleBinding")
        for subject in binding["subjects"]
    }

    assert named | bound <= accounts


@pytest.mark.parametrize("case", CASES)
def test_every_selector_finds_the_pods_it_is_for(case: str) -> None:
    documents = rendered(case)
    labels = [
        document["spec"]["template"]["metadata"]["labels"].items()
        for document in of_kind(documents, "Deployment", "StatefulSet")
    ]

    for document in of_kind(documents, "Service"):
        wanted = document["spec"]["selector"].items()
        assert sum(wanted <= each for each in labels) == 1, title(document)
    for document in of_kind(documents, "PodDisruptionBudget", "ServiceMonitor"):
        wanted = document["spec"]["selector"]["matchLabels"].items()
        assert sum(wanted <= each for each in labels) == 1, title(document)
    for document in of_kind(documents, "NetworkPolicy"):
        wanted = document["spec"]["podSelector"]["matchLabels"].items()
        assert sum(wanted <= each for each in labels) == 1, title(document)


def test_registries_let_the_operator_in() -> None:
    _, let_in = network.from_own(_owner(), NAMESPACE, network.GRPC_PORT)["from"]

    assert let_in["podSelector"]["matchLabels"].items() <= _operator("default")["metadata"]["labels"].items()


_NAME = "kubernetes.io/metadata.name"


@pytest.mark.attack(
    boundary="redis",
    attack="a pod that gives itself the labels of ours",
    outcome="NetworkPolicy selects namespaces, whose labels it cannot set",
)
@pytest.mark.parametrize(
    ("case", "words", "namespaces"),
    [
        pytest.param("default", (), {}, id="all namespaces"),
        pytest.param(
            "namespaced",
            ("--set", "redis.enabled=true"),
            {"matchExpressions": [{"key": _NAME, "operator": "In", "values": ["team-a", "team-b"]}]},
            id="some namespaces",
        ),
        pytest.param("everything", (), {"matchLabels": {"example.com/speculators": "yes"}}, id="chosen ones"),
    ],
)
def test_redis_lets_in_the_operator_and_namespaces_but_no_labels_of_pods(
    case: str, words: tuple[str, ...], namespaces: dict[str, Any]
) -> None:
    """Whoever may create a pod in any namespace gives it every label."""
    (policy,) = (
        each for each in of_kind(rendered(case, *words), "NetworkPolicy") if "-redis" in each["metadata"]["name"]
    )
    (rule,) = policy["spec"]["ingress"]
    operator, peer = rule["from"]
    labels = {"app.kubernetes.io/name": "updraft-operator", "app.kubernetes.io/instance": RELEASE}
    assert operator == {"podSelector": {"matchLabels": labels}}, "of the release's own namespace"
    assert peer == {"namespaceSelector": namespaces}


def test_the_address_of_redis_is_not_shown_by_the_mark_that_restarts_the_operator() -> None:
    marks = [
        one(rendered("small", "--set", f"redis.url={url}"), "Deployment", "updraft-operator")["spec"]["template"][
            "metadata"
        ]["annotations"]["checksum/redis"]
        for url in ("redis://:a@h:6379/0", "redis://:b@h:6379/0", "redis://:a@h:6379/0")
    ]
    assert marks[0] == marks[2] != marks[1]
    assert hashlib.sha256(b"redis://:a@h:6379/0").hexdigest() not in marks


def test_the_operator_may_call_registries_where_it_may_not_call_everyone() -> None:
    policy = one(rendered("everything"), "NetworkPolicy", "speculation-operator")
    (registries,) = [rule for rule in policy["spec"]["egress"] if "to" in rule]
    ports = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
    assert {6379, 6380} <= set(ports)

    assert registries["ports"] == [{"port": network.GRPC_PORT, "protocol": "TCP"}]
    wanted = registries["to"][0]["podSelector"]["matchLabels"]
    assert wanted.items() <= names.labels("chat", names.REGISTRY).items()


def test_two_operators_stand_on_different_nodes_and_go_one_at_a_time() -> None:
    documents = rendered("default")
    deployment = one(documents, "Deployment", "updraft-operator")["spec"]

    assert deployment["replicas"] == 2
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert "podAntiAffinity" in deployment["template"]["spec"]["affinity"]
    assert one(documents, "PodDisruptionBudget", "updraft-operator")["spec"]["maxUnavailable"] == 1


def test_crds_are_kept_unless_one_asks_otherwise() -> None:
    def kept(case: str) -> dict[str, bool]:
        crds = of_kind(rendered(case), "CustomResourceDefinition")
        return {
            crd["metadata"]["name"]: crd["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
            for crd in crds
        }

    plurals = (names.SPECULATORS, names.DRAFT_VERSIONS, names.DRAFT_IMPORTS)
    ours = {f"{plural}.{names.GROUP}" for plural in plurals}
    assert kept("default") == dict.fromkeys(ours, True)
    assert kept("small") == dict.fromkeys(ours, False)
    assert kept("namespaced") == {}


def test_in_namespaces_of_its_own_the_chart_needs_no_rights_in_the_cluster() -> None:
    shared = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}

    assert not of_kind(rendered("namespaced"), *shared)
    assert _variables(_operator("namespaced")["spec"])["UPDRAFT_OPERATOR_WATCH_NAMESPACES"] == "team-a,team-b"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (
            "default",
            "rediss://:$(REDIS_PASSWORD)@updraft-redis.updraft-system.svc:6379/0?ssl_ca_certs=/etc/updraft/ca/ca.crt",
        ),
        ("no-redis", None),
        ("external-redis", {"name": "our-redis", "key": "address"}),
        ("small", {"name": "updraft-redis", "key": "url"}),
    ],
)
def test_the_operator_is_told_of_the_redis_that_there_is(case: str, expected: object) -> None:
    variables = _operator(case)["spec"]["containers"][0]["env"]

    told = [variable for variable in variables if variable["name"] == "UPDRAFT_OPERATOR_REDIS_URL"]

    assert [each.get("value") or each["valueFrom"]["secretKeyRef"] for each in told] == ([expected] if expected else [])
    assert (len(of_kind(rendered(case), "StatefulSet")) == 1) == (case == "default")


def test_images_come_from_where_the_values_say() -> None:
    variables = _variables(
        one(rendered("everything"), "Deployment", "speculation-operator")["spec"]["template"]["spec"]
    )

    prefix = "UPDRAFT_OPERATOR_"
    images = {
        name.removeprefix(prefix).removesuffix("_IMAGE"): value
        for name, value in variables.items()
        if name.endswith("_IMAGE")
    }
    assert images == {
        "OPERATOR": "registry.example.com/ml/updraft-operator@sha256:" + "0123456789abcdef" * 4,
        "INFERENCE": "other.example.com:5000/updraft-inference-cuda:v9-cuda",
        "TRAINER": "registry.example.com/ml/updraft-trainer:v9",
        "REDIS": "mirror.example.com/redis:8.2-bookworm",
        "REGISTRY": "registry.example.com/ml/updraft-registry:v9",
        "SGLANG": "registry.example.com/ml/lmsysorg/sglang:v0.5.23",
        "VLLM": "registry.example.com/ml/vllm/vllm-openai:v0.32.0",
    }
    assert variables["UPDRAFT_OPERATOR_IMAGE_PULL_SECRETS"] == "regcred,other"


def test_common_labels_and_annotations_are_on_every_object_and_change_no_selector() -> None:
    documents = [
        each for each in rendered("everything") if not each["metadata"]["name"].startswith(("as-a", "updraft-as"))
    ]

    for document in documents:
        assert document["metadata"]["labels"]["team"] == "inference", title(document)
        assert document["metadata"]["annotations"]["example.com/owner"] == "inference", title(document)
    for workload in of_kind(tuple(documents), "Deployment", "StatefulSet"):
        assert "team" not in workload["spec"]["selector"]["matchLabels"]
        assert workload["spec"]["template"]["metadata"]["labels"]["team"] == "inference"


def test_objects_of_ones_own_are_installed_too() -> None:
    found = {each["metadata"]["name"] for each in of_kind(rendered("everything"), "ConfigMap")}

    assert {"as-a-map", f"{RELEASE}-as-text"} <= found


def test_a_spread_without_a_selector_is_of_the_operator() -> None:
    pod = one(rendered("everything"), "Deployment", "speculation-operator")["spec"]["template"]

    (constraint,) = pod["spec"]["topologySpreadConstraints"]

    assert constraint["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_names_fit_however_long_the_release_is_called() -> None:
    result = helm("template", "r" * 53, CHART, "--namespace", "n" * 63, "--values", values("monitoring"))

    assert result.returncode == 0, result.stderr
    names_in_it = [line.removeprefix("  name: ") for line in result.stdout.splitlines() if line.startswith("  name: ")]
    assert max(map(len, names_in_it)) <= 128
    services = [name for name in names_in_it if name.endswith(("-operator", "-redis"))]
    assert services
    assert max(map(len, services)) <= 63


def test_notes_say_what_to_do_next() -> None:
    result = helm(
        "install", RELEASE, CHART, "--dry-run=client", "--namespace", NAMESPACE, "--values", values("no-redis")
    )

    assert result.returncode == 0, result.stderr
    notes = result.stdout.partition("NOTES:")[2]
    assert "kind: AdaptiveSpeculator" in notes
    assert "helm test -n updraft-system updraft" in notes
    assert "there is no Redis" in notes


@pytest.mark.parametrize("case", CASES)
def test_the_operator_knows_every_variable_and_every_word_that_it_is_given(case: str) -> None:
    for name, pod in pods(rendered(case)):
        (container,) = pod["containers"]
        if container["command"] != ["updraft-operator"]:
            continue
        elsewhere = {"UPDRAFT_OPERATOR_REDIS_URL": "redis://:from-elsewhere@redis:6379/0"}
        given = {
            each["name"]: each.get("value", elsewhere.get(each["name"], "from-elsewhere")) for each in container["env"]
        }
        settings.load(OperatorSettings, given)
        parsed = commands._parser().parse_args(container.get("args", []))
        assert parsed.command == {"operator": None}.get(container["name"], container["name"]), name
