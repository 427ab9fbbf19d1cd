"""The cost of a step is a curve over rows, which serving corrects."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.torch_engine.drafting.lookahead.cost import GRID, ChainCost, CostTable

curves = st.dictionaries(st.sampled_from(GRID), st.floats(0.001, 1.0), min_size=1)
CURVE = {1: 0.030, 8: 0.036, 64: 0.092}
BUSY_START = {rows: 0.0335 if rows == 1 else 0.0638 for rows in GRID if rows <= 16} | {64: 0.075, 256: 0.180}
"""Measured at start-up next to a busy neighbour, on a machine where 1 row takes 22 ms and 16 take 25."""


def true_seconds(rows: int) -> float:
    return 0.0218 + 0.0002 * rows


@given(curves, st.integers(1, 300))
def test_more_rows_never_cost_less(curve: dict[int, float], rows: int) -> None:
    table = CostTable(curve)
    assert 0 < table.curve.at(rows) <= table.curve.at(rows + 1)


@given(curves, st.lists(st.tuples(st.integers(1, 300), st.floats(1e-4, 10.0)), max_size=60), st.integers(1, 300))
def test_more_rows_never_cost_less_whatever_steps_took(
    measured: dict[int, float], steps: list[tuple[int, float]], rows: int
) -> None:
    curve = CostTable(measured).curve
    for observed, seconds in steps:
        curve.observe(observed, seconds)
    assert 0 < curve.at(rows) <= curve.at(rows + 1) + 1e-12


@pytest.mark.parametrize(("rows", "seconds"), [(1, 0.030), (8, 0.036), (36, 0.064), (64, 0.092), (128, 0.184)])
def test_costs_between_points_are_interpolated(rows: int, seconds: float) -> None:
    assert CostTable(CURVE).curve.at(rows) == pytest.approx(seconds)


def test_a_larger_forward_bounds_what_a_disturbed_smaller_one_may_cost() -> None:
    assert CostTable({1: 0.030, 2: 0.090, 8: 0.036}).curve.at(2) <= 0.036


def test_a_start_up_next_to_a_busy_neighbour_is_corrected_within_seconds() -> None:
    table = CostTable(BUSY_START)
    for step in range(80):  # two seconds of serving
        rows = 1 + step % 4
        table.observe(1, rows, true_seconds(rows))
    for rows in (1, 2, 3, 4):
        assert table.curve.at(rows) == pytest.approx(true_seconds(rows), rel=0.1)
    for rows in (6, 8, 12, 16):  # never run
        assert table.curve.at(rows) < 1.3 * true_seconds(rows)


def test_rows_between_those_that_ran_are_corrected_too() -> None:
    table = CostTable(BUSY_START)
    for step in range(80):
        rows = (1, 16)[step % 2]
        table.observe(1, rows, true_seconds(rows))
    assert [table.curve.at(rows) for rows in (2, 6, 12)] == pytest.approx(
        [true_seconds(rows) for rows in (2, 6, 12)], rel=0.2
    )


def test_a_start_up_that_was_too_fast_is_corrected_too() -> None:
    table = CostTable({rows: 0.2 * true_seconds(rows) for rows in GRID})
    for _ in range(80):
        table.observe(8, 8, true_seconds(8))
    assert table.curve.at(8) == pytest.approx(true_seconds(8), rel=0.15)
    assert table.curve.at(12) > 0.6 * true_seconds(12)


def test_another_number_of_sequences_starts_from_the_corrected_curve() -> None:
    table = CostTable(BUSY_START)
    for _ in range(80):
        table.observe(1, 8, true_seconds(8))
    assert table.seconds(4, 8) == pytest.approx(true_seconds(8), rel=0.1)


def test_one_disturbed_step_moves_little() -> None:
    table = CostTable(CURVE)
    for _ in range(20):
        table.observe(1, 1, 0.030)
    table.observe(1, 1, 3.0)
    assert table.curve.at(1) < 0.0325
    assert table.seconds(1, 1) < 0.033


def test_disturbed_steps_now_and_then_do_not_move_the_curve_away() -> None:
    table, draw = CostTable({rows: true_seconds(rows) for rows in GRID}), random.Random(3)
    for step in range(2000):
        rows = 1 + step % 8
        slow = 20.0 if draw.random() < 0.03 else 1.0
        table.observe(1, rows, slow * true_seconds(rows) * draw.uniform(0.97, 1.03))
    for rows in (1, 4, 8, 16):
        assert table.curve.at(rows) == pytest.approx(true_seconds(rows), rel=0.1)


def test_what_rows_do_not_explain_is_a_factor_of_the_number_of_sequences() -> None:
    table = CostTable({rows: true_seconds(rows) for rows in GRID})
    for _ in range(100):
        table.observe(8, 16, 1.5 * true_seconds(16))  # long contexts
        table.observe(1, 16, true_seconds(16))
    assert table.seconds(8, 16) > 1.3 * table.seconds(1, 16)


def test_a_cost_that_was_high_once_is_doubted_after_a_while() -> None:
    table = CostTable(CURVE)
    for _ in range(20):
        table.observe(8, 64, 2 * 0.092)
    high = table.seconds(8, 64)
    for _ in range(1500):
        table.observe(8, 8, 0.036)
    assert table.seconds(8, 64) < 1.15 * 0.092 < high


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 10), st.floats(1e-4, 10.0)), max_size=60))
def test_whatever_is_observed_costs_stay_positive(steps: list[tuple[int, int, float]]) -> None:
    table = CostTable(CURVE)
    for batch, drafts, seconds in steps:
        table.observe(batch, batch + drafts, seconds)
        assert 0 < table.seconds(batch, batch + drafts) < 100


def test_steps_with_prompts_are_known_after_a_few_and_move_no_other_kind() -> None:
    table = CostTable(CURVE)
    assert table.mixed(64) == pytest.approx(0.092)
    for _ in range(5):
        table.observe_mixed(64, 0.184)  # a long context
    assert table.mixed(36) == pytest.approx(2 * 0.064, rel=0.05)
    assert table.seconds(8, 8) == pytest.approx(0.036)

    table.observe_mixed(64, 9.2)
    assert table.mixed(64) < 2 * 0.184


@given(st.integers(0, 9), st.integers(0, 80), st.lists(st.tuples(st.integers(1, 9), st.integers(0, 60)), max_size=20))
def test_all_numbers_of_rows_at_once_cost_what_they_cost_one_by_one(
    batch: int, most: int, steps: list[tuple[int, int]]
) -> None:
    table = CostTable(CURVE)
    for sequences, drafts in steps:
        table.observe(sequences, sequences + drafts, 0.05)
    assert table.up_to(batch, most) == pytest.approx([table.seconds(batch, rows) for rows in range(most + 1)])


class TestChains:
    """The cost of the draft model's chains is learned apart from the rows that it has to read before them."""

    @pytest.fixture
    def costs(self) -> ChainCost:
        return ChainCost(CostTable({1: 0.02, 8: 0.04, 64: 0.08}))

    def test_a_share_of_the_targets_forward_is_assumed_until_something_is_known(self, costs: ChainCost) -> None:
        assert costs.token(1) == pytest.approx(0.002)

    def test_chains_that_were_made_predict_other_numbers_of_sequences(self, costs: ChainCost) -> None:
        for _ in range(100):
            costs.observe(sequences=1, length=3, behind=4, seconds=0.009)
        assert costs.token(1) == pytest.approx(0.003)
        assert costs.token(8) == pytest.approx(0.006)

    def test_a_target_that_proves_faster_does_not_make_known_chains_cheaper(self, costs: ChainCost) -> None:
        for _ in range(100):
            costs.observe(sequences=1, length=3, behind=4, seconds=0.009)
            costs.table.observe(1, 1, 0.010)
        assert costs.token(1) == pytest.approx(0.003)

    def test_rows_that_were_left_out_do_not_make_drafting_look_expensive(self, costs: ChainCost) -> None:
        costs.observe(sequences=8, length=3, behind=8 * 4, seconds=0.012)
        for _ in range(100):
            costs.observe(sequences=8, length=3, behind=8 * 4 + 56, seconds=0.5)
        assert costs.token(8) == pytest.approx(0.004)

    def test_one_slow_step_counts_for_little(self, costs: ChainCost) -> None:
        for _ in range(20):
            costs.observe(sequences=1, length=1, behind=1, seconds=0.002)
        costs.observe(sequences=1, length=1, behind=1, seconds=5.0)
        assert costs.token(1) < 0.0025
