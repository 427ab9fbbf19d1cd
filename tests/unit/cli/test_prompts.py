import pytest

from updraft_chassis.errors import InvalidInput
from updraft_cli.prompts import DOMAINS, domain_prompts, num_prompts


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_has_enough_prompts_and_none_twice(domain: str) -> None:
    prompts = domain_prompts(domain, num_prompts(domain))
    assert len(prompts) >= 300
    assert len(set(prompts)) == len(prompts)
    assert all(prompt == prompt.strip() and len(prompt) <= 1000 for prompt in prompts)


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_prompts_are_never_among_the_others(domain: str) -> None:
    everything = domain_prompts(domain, num_prompts(domain), seed=1)
    held_out = domain_prompts(domain, num_prompts(domain, held_out=True), seed=2, held_out=True)
    assert len(held_out) >= 90
    assert not set(everything) & set(held_out)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_seed_decides_the_order_and_nothing_else(domain: str) -> None:
    assert domain_prompts(domain, 20, seed=3) == domain_prompts(domain, 20, seed=3)
    assert domain_prompts(domain, 20, seed=3) != domain_prompts(domain, 20, seed=4)


def test_an_unknown_domain_is_told_with_those_that_exist() -> None:
    with pytest.raises(InvalidInput, match="no domain poetry; there are code, math, sql, json, chat"):
        domain_prompts("poetry", 1)


def test_more_prompts_than_there_are_is_told_with_the_number() -> None:
    with pytest.raises(InvalidInput, match=r"chat has \d+ prompts; 100000 were asked for"):
        domain_prompts("chat", 100_000)
