"""Who may reach the pods of a speculator."""

from dataclasses import replace
from typing import Any

import pytest
from tests.support.manifests import CONFIG
from tests.support.observed import observed

from updraft_operator.manifests.manifest import Manifest
from updraft_operator.planning.plan import objects

_BY_KUBERNETES = "kubernetes.io/metadata.name"
"""A label that the API server sets to the name of a namespace; nobody can change it."""


def _policies() -> dict[str, Manifest]:
    config = replace(CONFIG, has_dedicated_redis=True)
    spec: dict[str, Any] = {"traces": {"redis": {"mode": "Dedicated"}}, "trainer": {"nodes": 2}}
    url = f"redis://updraft-administrator:{64 * 'a'}@qwen-redis.team.svc:6379/0"
    made = objects(observed(spec, config=config, dedicated_url=url))
    return {each["metadata"]["name"]: each["spec"] for each in made if each["kind"] == "NetworkPolicy"}


@pytest.mark.attack(
    boundary="redis",
    attack="a pod of another namespace that sets the labels of a resource's pods, or of the operator",
    outcome="network policies admit pods of other namespaces by the name of their namespace only",
)
def test_a_peer_of_another_namespace_is_selected_by_what_its_tenants_cannot_set() -> None:
    policies = _policies()
    assert policies.keys() == {"qwen-serving", "qwen-trainer", "qwen-registry", "qwen-redis"}
    peers = [peer for policy in policies.values() for rule in policy["ingress"] for peer in rule.get("from", ())]
    assert len(peers) == 5
    for peer in peers:
        selector = peer.get("namespaceSelector", {"matchLabels": {_BY_KUBERNETES: "its own"}})
        assert selector.keys() == {"matchLabels"}
        assert _BY_KUBERNETES in selector["matchLabels"], "pods of its own namespace, or of the operator's"
        assert peer["podSelector"]["matchLabels"]


@pytest.mark.attack(
    boundary="tenants",
    attack="scraping the pods of another namespace, where `networkPolicy.metricsFrom` names who may",
    outcome="network policies admit those only to ports of metrics, and clients to the port of clients",
)
@pytest.mark.parametrize(("engine", "clients", "scraped"), [("Torch", 8000, None), ("SGLang", 30000, 9093)])
def test_only_the_named_peers_reach_ports_of_metrics(engine: str, clients: int, scraped: int | None) -> None:
    prometheus = {"namespaceSelector": {"matchLabels": {_BY_KUBERNETES: "monitoring"}}}
    config = replace(CONFIG, metrics_from=(prometheus,))
    made = objects(observed({"engine": {"type": engine}}, config=config))
    rules = [rule for each in made if each["kind"] == "NetworkPolicy" for rule in each["spec"]["ingress"]]
    from_prometheus = [port["port"] for rule in rules if rule.get("from") == [prometheus] for port in rule["ports"]]
    from_anyone = [port["port"] for rule in rules if "from" not in rule for port in rule["ports"]]
    assert sorted(from_prometheus) == [9091, 9092, *([scraped] if scraped else [])]
    assert from_anyone == [clients]


def test_a_dedicated_redis_makes_no_calls_and_is_open_to_its_pods_and_the_operator() -> None:
    policy = _policies()["qwen-redis"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    (rule,) = policy["ingress"]
    assert [port["port"] for port in rule["ports"]] == [6379]
    own, operator = rule["from"]
    assert own == {"podSelector": {"matchLabels": {"updraft.dev/speculator": "qwen"}}}
    assert operator["namespaceSelector"]["matchLabels"] == {_BY_KUBERNETES: "updraft-system"}
