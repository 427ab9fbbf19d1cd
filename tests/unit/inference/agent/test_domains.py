"""Which domains a pod counts by name, whatever names its callers make up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.requests import ended, step

from updraft_inference.agent.counters import Tallies, folded
from updraft_inference.agent.domains import MAX_CHARS, MAX_DOMAINS, MAX_WEIGHT, OTHER, admit, label


def admitted(names: list[str]) -> dict[str, int]:
    weights: dict[str, int] = {}
    for name in names:
        weights = admit(weights, name)
    return weights


@given(st.lists(st.integers(0, 40), max_size=300))
def test_a_domain_of_more_than_a_seventeenth_of_the_requests_is_in_the_table(numbers: list[int]) -> None:
    weights = admitted([str(number) for number in numbers])
    assert len(weights) <= MAX_DOMAINS
    for number in set(numbers):
        assert str(number) in weights or numbers.count(number) * (MAX_DOMAINS + 1) <= len(numbers)


def test_a_domain_that_nobody_uses_any_more_gives_way() -> None:
    weights = {f"old{n}": MAX_WEIGHT for n in range(MAX_DOMAINS)}
    for _ in range(MAX_WEIGHT + 1):
        weights = admit(weights, "new")
    assert set(weights) == {"new"}


@pytest.mark.attack(
    boundary="client",
    attack="a domain header with control characters or of any length",
    outcome="it becomes one short printable line",
)
@given(st.text(max_size=200))
def test_a_label_is_one_short_printable_line(name: str) -> None:
    assert label(name).isprintable()
    assert len(label(name)) <= MAX_CHARS


def count(tallies: Tallies, domain: str, domains: set[str]) -> Tallies:
    return folded(tallies, ended(step(1, 1, version=2), step(3, 2, version=2)), domain=domain, domains=domains)


def test_requests_count_for_their_domain_and_for_other_where_it_is_not_in_the_table() -> None:
    tallies: Tallies = {}
    for domain in ("sql", "sql", "rare", "", "other"):
        tallies = count(tallies, domain, {"sql"})
    counted = {entry.domain: (entry.requests, entry.verify_steps, entry.tokens) for entry in tallies[2].domains}
    assert counted == {"sql": (2, 4, 10), OTHER: (2, 4, 10)}
    assert tallies[2].requests_served == 5, "a request without a domain counts for none"


def test_the_counters_of_a_domain_that_left_the_table_are_dropped() -> None:
    tallies = count(count({}, "sql", {"sql", "chat"}), "chat", {"chat"})
    assert [entry.domain for entry in tallies[2].domains] == ["chat"]
