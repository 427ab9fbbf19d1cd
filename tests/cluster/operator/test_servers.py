"""Pods of stock servers on the real API server: it takes them as they are meant, and gives no cause to write them again."""

import pytest
from tests.cluster.access import Json
from tests.cluster.operator import requests
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import Subject
from tests.support.wait import wait_until

from updraft_operator.api import names

KEYS = {"apiKeysSecretRef": {"name": "clients", "key": "keys"}, "maxRequestsPerKey": 4}


@pytest.fixture(params=["SGLang", "VLLM"])
def server(operator: Running, subject: Subject, request: pytest.FixtureRequest) -> Subject:
    """A speculator with this engine whose clients have keys."""
    secret = {"metadata": {"name": "clients"}, "stringData": {"keys": "a-key-of-a-client\n"}}
    subject.api.create(f"/api/v1/namespaces/{subject.namespace}/secrets", secret)
    subject.create(
        engine={"type": request.param}, serving={**KEYS, "replicas": 2, "terminationGracePeriodSeconds": 300}
    )
    subject.wait_until_built()
    wait_until(lambda: len(subject.pods(names.SERVING)) == 2, what="both pods")
    return subject


def containers(pod: Json, kind: str) -> dict[str, Json]:
    return {each["name"]: each for each in pod["spec"].get(kind, ())}


def test_the_agent_is_a_sidecar_and_the_server_has_to_prove_its_keys(server: Subject) -> None:
    for pod in server.pods(names.SERVING):
        init, (engine,) = containers(pod, "initContainers"), containers(pod, "containers").values()
        assert [(name, each.get("restartPolicy")) for name, each in init.items()] == [
            ("prepare", None),
            ("inference", "Always"),
        ]
        agent = init["inference"]
        assert not {"startupProbe", "readinessProbe", "lifecycle"} & agent.keys(), "its troubles are not the server's"
        assert agent["livenessProbe"]["httpGet"]["path"] == "/healthz"
        assert engine["startupProbe"]["exec"]["command"][:3] == ["python3", "-I", "-c"]
        assert engine["lifecycle"] == {"preStop": {"sleep": {"seconds": 5}}}
        (keys,) = (volume["secret"] for volume in pod["spec"]["volumes"] if "secret" in volume)
        assert (keys["secretName"], keys["items"]) == ("clients", [{"key": "keys", "path": "keys"}])


def test_what_the_api_server_adds_to_a_servers_pod_is_not_written_again(operator: Running, server: Subject) -> None:
    operator.wait_for_listings(1)
    since = requests.now()

    operator.wait_for_listings(3)

    assert requests.writes(operator.cluster, operator.account.user, since, namespace=server.namespace) == []
    generation = server.get("Deployment", f"{server.name}-serving")["metadata"]["generation"]
    assert generation == 1, "the Deployment was written once"


def test_a_servers_pods_are_counted_and_their_service_names_the_servers_port(server: Subject) -> None:
    server.run(names.SERVING, 2)

    server.wait_for("Available", "True", "PodsReady")
    (port,) = server.get("Service")["spec"]["ports"]
    (pod, _) = server.pods(names.SERVING)
    (engine,) = containers(pod, "containers").values()
    assert port["targetPort"] in [each["name"] for each in engine["ports"]]


CLAIMS: Json = {
    "accelerator": {"resourceName": "nvidia.com/mig-1g.10gb"},
    "resources": {"claims": [{"name": "fabric"}]},
    "podTemplate": {
        "metadata": {
            "labels": {"kueue.x-k8s.io/queue-name": "team-a"},
            "annotations": {"kueue.x-k8s.io/podset-preferred-topology": "cloud.provider.com/rack"},
        },
        "spec": {
            "resourceClaims": [{"name": "fabric", "resourceClaimTemplateName": "rdma"}],
            "schedulingGates": [{"name": "kueue.x-k8s.io/admission"}],
            "nodeSelector": {"topology.kubernetes.io/zone": "a"},
        },
    },
}


def test_slices_claims_queues_and_topology_reach_pods_and_are_named_while_they_wait(
    operator: Running, subject: Subject
) -> None:
    subject.create(engine={"type": "VLLM"}, serving=CLAIMS)
    subject.wait_until_built()
    wait_until(lambda: bool(subject.pods(names.SERVING)), what="the pod")

    (pod,) = subject.pods(names.SERVING)
    resources = containers(pod, "containers")["engine"]["resources"]
    assert resources["claims"] == [{"name": "fabric"}]
    assert resources["limits"] == resources["requests"] == {"nvidia.com/mig-1g.10gb": "1"}
    assert pod["spec"]["resourceClaims"] == [{"name": "fabric", "resourceClaimTemplateName": "rdma"}]
    assert pod["spec"]["nodeSelector"] == {"topology.kubernetes.io/zone": "a"}
    assert pod["metadata"]["annotations"]["kueue.x-k8s.io/podset-preferred-topology"] == "cloud.provider.com/rack"
    message = subject.wait_for("Available", "False", "Queued")
    assert "Kueue has not admitted it yet (team-a; gates kueue.x-k8s.io/admission)" in message
