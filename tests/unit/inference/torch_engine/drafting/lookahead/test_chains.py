"""What the draft model costs is learned for chains, apart from what it has to read before."""

import pytest

from updraft_inference.torch_engine.drafting.lookahead.chains import ChainCost
from updraft_inference.torch_engine.drafting.lookahead.cost import CostTable


def costs() -> ChainCost:
    return ChainCost(CostTable({1: 0.02, 8: 0.04, 64: 0.08}))


def test_a_share_of_the_targets_forward_is_assumed_until_something_is_known() -> None:
    assert costs().token(1) == pytest.approx(0.002)


def test_chains_that_were_seen_tell_of_other_numbers_of_sequences() -> None:
    known = costs()
    for _ in range(100):
        known.observe(sequences=1, length=3, behind=4, seconds=0.009)
    assert known.token(1) == pytest.approx(0.003)
    assert known.token(8) == pytest.approx(0.006)


def test_rows_that_were_left_out_do_not_make_drafting_look_dear() -> None:
    known = costs()
    for _ in range(100):
        read_s = known.observe(sequences=8, length=3, behind=8 * 4 + 56, seconds=0.012 + 0.1 * (0.08 - 0.04))
    assert known.token(8) == pytest.approx(0.004)
    assert read_s == pytest.approx(0.1 * (0.08 - 0.04))


def test_a_model_that_costs_half_of_what_is_assumed_reads_for_half_as_long_too() -> None:
    known = costs()
    for _ in range(100):
        read_s = known.observe(sequences=8, length=3, behind=8 * 4 + 56, seconds=0.5 * (0.012 + 0.1 * (0.08 - 0.04)))
    assert known.token(8) == pytest.approx(0.002)
    assert read_s == pytest.approx(0.05 * (0.08 - 0.04))


def test_a_time_that_rows_alone_explain_says_that_chains_cost_little_until_others_say_more() -> None:
    known = costs()
    for _ in range(100):
        known.observe(sequences=1, length=1, behind=600, seconds=0.001)
    assert 0 < known.token(1) < 0.0002
    for _ in range(200):
        known.observe(sequences=1, length=1, behind=1, seconds=0.002)
    assert known.token(1) == pytest.approx(0.002, rel=0.01)
    known.observe(sequences=8, length=1, behind=8, seconds=0.004)
    assert known.token(8) == pytest.approx(0.004, rel=0.01), "as was expected by what is known of one"


def test_one_slow_step_counts_for_little() -> None:
    known = costs()
    for _ in range(20):
        known.observe(sequences=1, length=1, behind=1, seconds=0.002)
    known.observe(sequences=1, length=1, behind=1, seconds=5.0)
    assert known.token(1) < 0.0025
