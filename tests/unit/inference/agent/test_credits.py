"""Credits: a pod captures as many tokens per second as it was granted, whatever its traffic."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from updraft_inference.agent.credits import (
    BURST_S,
    HELD_OUT_PREFERENCE,
    MAX_BIAS,
    MAX_DOMAINS,
    Credits,
    RejectionBias,
    TokenBucket,
)


def captured_and_offered(granted: float, offered: float, *, mean_tokens: int, seed: int) -> tuple[float, float]:
    """Tokens per second, of requests of random sizes for an hour, after ten minutes to settle; `offered` is their mean."""
    rng, pod = random.Random(seed), Credits()
    pod.grant(granted, 0.0)
    now_s, captured, came = 0.0, 0, 0
    while now_s < 4200.0:
        now_s += rng.expovariate(offered / mean_tokens)
        tokens = rng.randint(1, 2 * mean_tokens)
        came += tokens if now_s > 600.0 else 0
        chance = pod.chance("", now_s)
        if rng.random() < chance.payload:
            pod.settle(pod.reserve(), tokens)
            captured += tokens if now_s > 600.0 else 0
        pod.observe("", offered=tokens, proposed=0, accepted=0)
    return captured / 3600.0, came / 3600.0


@settings(max_examples=25, deadline=None)
@given(granted=st.floats(100.0, 2000.0), load=st.sampled_from([0.2, 1.5, 3.0, 20.0]), seed=st.integers(0, 2**16))
def test_a_pod_captures_what_it_is_granted_or_all_that_there_is(granted: float, load: float, seed: int) -> None:
    captured, offered = captured_and_offered(granted, granted * load, mean_tokens=500, seed=seed)
    assert captured <= 1.03 * granted + BURST_S * granted / 3600.0
    assert captured >= 0.8 * min(granted, offered)


@settings(max_examples=200)
@given(
    steps=st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 5000.0)), max_size=40),
    rate=st.floats(0.1, 1000.0),
)
def test_a_bucket_never_gives_more_than_its_burst_and_its_rate(steps: list[tuple[float, float]], rate: float) -> None:
    bucket, now_s, taken = TokenBucket(), 0.0, 0.0
    bucket.grant(rate, 0.0)
    for wait_s, tokens in steps:
        now_s += wait_s
        level = bucket.level(now_s)
        assert level <= 1.0
        if level > 0.0:  # the last request may be larger than what is left
            assert taken <= BURST_S * rate + rate * now_s + 1e-6 * taken
            bucket.charge(tokens)
            taken += tokens


def test_without_a_grant_everything_may_be_captured() -> None:
    pod = Credits()
    pod.settle(pod.reserve(), 10**9)
    assert (pod.chance("sql", 5.0).payload, pod.chance("sql", 5.0).held_out) == (1.0, 1.0)


def test_a_grant_of_nothing_captures_nothing() -> None:
    pod = Credits()
    pod.grant(0.0, 0.0)
    assert pod.chance("", 1000.0).payload == 0.0
    assert pod.chance("", 1000.0).held_out == 0.0


def test_another_grant_keeps_the_probability_and_a_debt() -> None:
    bucket = TokenBucket()
    bucket.grant(10.0, 0.0)
    bucket.charge(BURST_S * 10.0 * 0.75)
    bucket.grant(20.0, 0.0)
    assert bucket.level(0.0) == pytest.approx(0.25)
    bucket.charge(BURST_S * 20.0)
    before = bucket.level(0.0) * BURST_S * 20.0
    bucket.grant(1000.0, 0.0)
    assert bucket.level(0.0) * BURST_S * 1000.0 == pytest.approx(before)


def test_a_request_that_captured_nothing_gives_its_tokens_back() -> None:
    pod = Credits()
    pod.grant(10.0, 0.0)
    pod.observe("", offered=300, proposed=0, accepted=0)
    reserved = pod.reserve()
    assert pod.chance("", 0.0).payload == pytest.approx(0.5)
    pod.settle(reserved, 0)
    assert pod.chance("", 0.0).payload == pytest.approx(1.0)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket()
    bucket.grant(10.0, 100.0)
    bucket.charge(300.0)
    assert bucket.level(50.0) == pytest.approx(0.5)


def test_domains_whose_drafts_are_rejected_are_likelier_and_held_out_requests_are_not() -> None:
    pod = Credits()
    pod.grant(10.0, 0.0)
    for _ in range(100):
        pod.observe("easy", offered=10, proposed=100, accepted=90)
        pod.observe("hard", offered=10, proposed=100, accepted=50)
    easy, hard, other = (pod.chance(domain, 0.0) for domain in ("easy", "hard", "new"))
    assert easy.payload == pytest.approx(0.5)
    assert other.payload == 1.0
    assert hard.payload == pytest.approx(50 / 30, rel=0.05)
    assert {easy.held_out, hard.held_out, other.held_out} == {HELD_OUT_PREFERENCE}


@given(
    requests=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.floats(0.0, 1.0)), min_size=1, max_size=60
    )
)
def test_the_bias_has_bounds(requests: list[tuple[str, int, float]]) -> None:
    bias = RejectionBias()
    for domain, proposed, share in requests:
        bias.observe(domain, proposed=proposed, accepted=int(share * proposed))
    assert all(1 / MAX_BIAS <= bias.factor(domain) <= MAX_BIAS for domain in "abcd")
    assert bias.factor("never seen") == 1.0


@pytest.mark.attack(boundary="traces", attack="ever more invented domains at the agent", outcome="a bounded table")
def test_names_of_domains_do_not_grow_without_a_limit() -> None:
    bias = RejectionBias()
    bias.observe("first", proposed=10, accepted=9)
    for n in range(MAX_DOMAINS):
        bias.observe(str(n), proposed=10, accepted=0)
    assert bias.factor("first") == 1.0, "forgotten"
    assert bias.factor("0") > 1.0
