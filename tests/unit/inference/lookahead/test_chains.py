"""What the draft model costs is learned for chains, and apart from that for what it has to read before."""

import pytest

from updraft_inference.lookahead.chains import ChainCost
from updraft_inference.lookahead.cost import CostTable


def costs() -> ChainCost:
    return ChainCost(CostTable({1: 0.02, 8: 0.04}))


def test_a_share_of_the_targets_forward_is_assumed_until_something_is_known() -> None:
    assert costs().token(1) == pytest.approx(0.002)
    assert costs().entry(64, 3) == 0


def test_chains_that_were_seen_tell_of_other_numbers_of_sequences() -> None:
    known = costs()
    for _ in range(100):
        known.observe(sequences=1, length=3, behind=4, seconds=0.009)
    assert known.token(1) == pytest.approx(0.003)
    assert known.token(8) == pytest.approx(0.006)


def test_rows_that_were_left_out_cost_by_their_number_and_leave_the_cost_of_a_token_alone() -> None:
    known = costs()
    for _ in range(100):
        known.observe(sequences=2, length=3, behind=8, seconds=0.009)
    before = known.token(2)
    for _ in range(100):
        known.observe(sequences=2, length=3, behind=48, seconds=0.009 + 40 * 0.0001)
    assert known.token(2) == before
    assert known.entry(24, 3) == pytest.approx(20 * 0.0001)
    assert known.entry(4, 3) == 0


def test_one_slow_step_counts_for_little() -> None:
    known = costs()
    known.observe(sequences=1, length=1, behind=1, seconds=0.002)
    known.observe(sequences=1, length=1, behind=1, seconds=5.0)
    assert known.token(1) < 0.0025
