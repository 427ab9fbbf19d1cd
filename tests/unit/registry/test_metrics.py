"""The gauges of domains: few, and only of those that have traffic now."""

from prometheus_client import CollectorRegistry
from tests.support.versions import version

from updraft.registry.v1 import registry_pb2 as pb
from updraft_registry.metrics import Metrics
from updraft_registry.rollout.version import DesiredState, Speculator
from updraft_rollouts.terms import Phase

NAME = "updraft_registry_domain_acceptance_length_tokens"


def served(*domains: str) -> list[pb.VersionTraffic]:
    of_domains = [pb.DomainTraffic(domain=name, verify_steps=10, tokens=25) for name in domains]
    return [pb.VersionTraffic(version=1, verify_steps=100, tokens=250, domains=of_domains)]


def test_a_domain_has_a_gauge_while_it_is_among_the_largest() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    speculator = Speculator(name="default", desired=DesiredState(), versions=(version(1, Phase.STABLE),))
    metrics.update(speculator, [], served("sql", "chat"))
    metrics.update(speculator, [], served("chat", 'x"\n'))

    def value(domain: str) -> float | None:
        return registry.get_sample_value(NAME, {"speculator": "default", "role": "stable", "domain": domain})

    assert (value("sql"), value("chat"), value('x"\n')) == (None, 2.5, 2.5)
