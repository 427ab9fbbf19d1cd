"""The cost of a step is a curve over rows, and what serving shows moves it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.torch_engine.drafting.lookahead.cost import GRID, CostTable

curves = st.dictionaries(st.sampled_from(GRID), st.floats(0.001, 1.0), min_size=1)
CURVE = {1: 0.030, 8: 0.036, 64: 0.092}


@given(curves, st.integers(1, 300))
def test_more_rows_never_cost_less(curve: dict[int, float], rows: int) -> None:
    table = CostTable(curve)
    assert 0 < table.alone(rows) <= table.alone(rows + 1)


@pytest.mark.parametrize(("rows", "seconds"), [(1, 0.030), (8, 0.036), (36, 0.064), (64, 0.092), (128, 0.184)])
def test_costs_lie_on_lines_between_what_was_measured(rows: int, seconds: float) -> None:
    assert CostTable(CURVE).alone(rows) == pytest.approx(seconds)


def test_steps_that_take_longer_than_the_curve_says_move_their_own_kind_most() -> None:
    table = CostTable(CURVE)
    for _ in range(30):
        table.observe(8, 8, 0.054)  # half as long again
    assert table.seconds(8, 8) == pytest.approx(0.054, rel=0.1)
    assert table.seconds(8, 36) == pytest.approx(0.064 * 1.5, rel=0.15)
    assert table.seconds(1, 1) == 0.030


def test_where_few_drafts_were_dear_more_are_thought_dear_until_they_are_tried() -> None:
    table = CostTable(CURVE)
    for _ in range(20):
        table.observe(8, 8, 0.036)
        table.observe(8, 10, 0.076)  # twice the curve
    assert table.seconds(8, 8) == pytest.approx(0.036, rel=0.05)
    assert table.seconds(8, 36) > 1.6 * table.alone(36)

    for _ in range(20):
        table.observe(8, 36, table.alone(36))
    assert table.seconds(8, 36) == pytest.approx(table.alone(36), rel=0.2)


def test_what_was_dear_once_is_tried_again_some_time() -> None:
    table = CostTable(CURVE)
    for _ in range(20):
        table.observe(8, 10, 0.076)
    dear = table.seconds(8, 10)
    for _ in range(1000):
        table.observe(8, 8, 0.036)
    assert table.seconds(8, 10) < 1.1 * table.alone(10) < dear


def test_one_step_that_was_disturbed_moves_little() -> None:
    table = CostTable(CURVE)
    for _ in range(20):
        table.observe(1, 1, 0.030)
    table.observe(1, 1, 3.0)
    assert table.seconds(1, 1) < 0.033


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 10), st.floats(1e-4, 10.0)), max_size=60))
def test_whatever_is_seen_costs_stay_positive(steps: list[tuple[int, int, float]]) -> None:
    table = CostTable(CURVE)
    for batch, drafts, seconds in steps:
        table.observe(batch, batch + drafts, seconds)
        assert 0 < table.seconds(batch, batch + drafts) < 100


def test_what_steps_with_prompts_take_is_known_after_a_few_and_moves_no_other_kind() -> None:
    table = CostTable(CURVE)
    assert table.mixed(64) == 0.092
    for _ in range(5):
        table.observe_mixed(64, 0.184)  # a long context
    assert table.mixed(36) == pytest.approx(2 * 0.064, rel=0.05)
    assert table.seconds(8, 8) == 0.036

    table.observe_mixed(64, 9.2)
    assert table.mixed(64) < 2 * 0.184


@given(st.integers(0, 9), st.integers(0, 80), st.lists(st.tuples(st.integers(1, 9), st.integers(0, 60)), max_size=20))
def test_all_numbers_of_rows_at_once_cost_what_they_cost_one_by_one(
    batch: int, most: int, steps: list[tuple[int, int]]
) -> None:
    table = CostTable(CURVE)
    for sequences, drafts in steps:
        table.observe(sequences, sequences + drafts, 0.05)
    assert table.up_to(batch, most) == [table.seconds(batch, rows) for rows in range(most + 1)]
