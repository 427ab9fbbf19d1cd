"""Answers of a registry as the values that the commands and the console show."""

from tests.support.registry_answers import rollout, state

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli.backends import wire


def test_the_evidence_of_a_domain_has_its_change_and_none_before_it_has_bounds() -> None:
    change = pb.Estimate(candidate=2.2, stable=2.0, change_percent=10.0, low_percent=1.0, high_percent=20.0)
    domains = [pb.DomainEstimate(domain="sql", acceptance_length=change), pb.DomainEstimate(domain="chat")]
    trial = wire.speculator(state(rollout=rollout(domains=domains))).trial
    assert trial is not None
    sql, chat = trial.domains
    assert (sql.domain, chat.domain, chat.acceptance_length) == ("sql", "chat", None)
    assert sql.acceptance_length is not None
    assert (sql.acceptance_length.low_percent, sql.acceptance_length.high_percent) == (1.0, 20.0)
