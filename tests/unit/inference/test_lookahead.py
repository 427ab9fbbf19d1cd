"""k is chosen for tokens a second: zero when drafting does not pay, more when drafts are kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.agent.lookahead import PROBE_EVERY, PROBE_STEPS, Lookahead, best_lookahead, expected_tokens

rates = st.lists(st.floats(0, 1), min_size=1, max_size=6)


@given(rates)
def test_more_drafts_never_give_fewer_tokens(acceptance: list[float]) -> None:
    tokens = [expected_tokens(acceptance, k) for k in range(len(acceptance) + 1)]
    assert tokens == sorted(tokens)
    assert tokens[0] == 1


@given(rates, st.floats(0.001, 1), st.floats(0, 1))
def test_no_other_k_gives_more_tokens_a_second(acceptance: list[float], fixed: float, each: float) -> None:
    best = best_lookahead(acceptance, lambda k: fixed + each * k, len(acceptance))
    speeds = [expected_tokens(acceptance, k) / (fixed + each * k) for k in range(len(acceptance) + 1)]
    assert speeds[best] == max(speeds)


@pytest.mark.parametrize(
    ("acceptance", "expected"),
    [
        pytest.param(0.0, 0, id="nothing is kept: no drafts"),
        pytest.param(0.95, 3, id="nearly all is kept: full chains"),
    ],
)
def test_the_choice_follows_what_was_observed(acceptance: float, expected: int) -> None:
    lookahead = Lookahead(max_k=3)
    for _ in range(200):
        lookahead.observe_acceptance(3, round(3 * acceptance))
    for width in range(1, 5):
        lookahead.observe_cost(batch=2, width=width, verify_s=0.05 + 0.002 * width, draft_s=0.004 * (width - 1))
    choices = [lookahead.choose(batch=2) for _ in range(PROBE_EVERY)][PROBE_STEPS:-1]
    assert set(choices) == {expected}


def test_a_draft_that_became_better_is_noticed() -> None:
    lookahead = Lookahead(max_k=3)
    for width in range(1, 5):
        lookahead.observe_cost(batch=1, width=width, verify_s=0.05, draft_s=0.002 * (width - 1))
    for _ in range(100):
        lookahead.observe_acceptance(3, 0)
    for _ in range(40 * PROBE_EVERY):  # only the probes draft
        if lookahead.choose(batch=1):
            lookahead.observe_acceptance(3, 3)
    assert lookahead.last > 0


def test_a_new_draft_starts_from_full_chains() -> None:
    lookahead = Lookahead(max_k=3)
    for _ in range(100):
        lookahead.observe_acceptance(3, 0)
    lookahead.reset_acceptance()
    assert lookahead.choose(batch=1) == 3


def test_catching_up_after_a_pause_does_not_make_drafting_look_dear() -> None:
    lookahead = Lookahead(max_k=2)
    for _ in range(8):  # unknown: full chains
        lookahead.choose(batch=1)
        lookahead.observe_cost(batch=1, width=3, verify_s=0.05, draft_s=0.004)
        lookahead.observe_acceptance(2, 2)
    lookahead.last = 0
    lookahead.choose(batch=1)
    lookahead.observe_cost(batch=1, width=3, verify_s=0.05, draft_s=5.0)
    assert lookahead.choose(batch=1) == 2
