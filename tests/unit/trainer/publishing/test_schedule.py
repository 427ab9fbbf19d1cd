from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_trainer.publishing.schedule import (
    MAX_BACKOFF_S,
    Progress,
    PublishBackoff,
    TrainingSchedule,
    is_estimate_due,
    is_fit_due,
    is_save_due,
    next_estimate,
    num_newest_judges,
    sizes_over_ranks,
)

PACE = TrainingSchedule(evaluate_steps=20, evaluate_seconds=15.0, checkpoint_seconds=60.0)
LAST = Progress(step=100, num_held_out=10, at_s=1000.0)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        pytest.param(Progress(step=119, num_held_out=10, at_s=1001.0), False, id="few steps"),
        pytest.param(Progress(step=120, num_held_out=10, at_s=1001.0), True, id="enough steps"),
        pytest.param(Progress(step=101, num_held_out=10, at_s=1015.0), True, id="a step and a while"),
        pytest.param(Progress(step=100, num_held_out=11, at_s=1015.0), True, id="new evidence and a while"),
        pytest.param(Progress(step=100, num_held_out=11, at_s=1014.0), False, id="new evidence at once"),
        pytest.param(Progress(step=100, num_held_out=10, at_s=9999.0), False, id="nothing changed"),
    ],
)
def test_an_estimate_is_due_when_enough_has_changed(now: Progress, *, expected: bool) -> None:
    assert is_estimate_due(now, LAST, PACE) is expected


def test_a_first_estimate_is_due_at_once() -> None:
    assert is_estimate_due(LAST, None, PACE)


@given(duration_s=st.floats(0.0, 1000.0), step_s=st.floats(0.1, 100.0))
def test_estimates_take_a_quarter_of_the_time_or_come_after_enough_steps_or_seconds(
    duration_s: float, step_s: float
) -> None:
    num_steps = next(
        n
        for n in range(1, 100)
        if is_estimate_due(
            Progress(step=100 + n, num_held_out=10, at_s=1000.0 + duration_s + n * step_s),
            LAST,
            PACE,
            duration_s=duration_s,
        )
    )
    share = duration_s / (duration_s + num_steps * step_s)
    assert share <= 0.25 + 1e-9 or num_steps == PACE.evaluate_steps


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param({"a": 31}, False, id="less than twice as many"),
        pytest.param({"a": 32}, True, id="twice as many"),
        pytest.param({"a": 16, "b": 15}, False, id="little of a new cluster"),
        pytest.param({"a": 10, "b": 16}, True, id="enough of a new cluster"),
        pytest.param({"a": 20, "b": 6, "c": 6}, True, id="twice as many in all"),
        pytest.param({}, False, id="everything evicted"),
    ],
)
def test_a_fit_is_due_when_traffic_or_a_cluster_of_it_has_grown(sizes: dict[str, int], *, expected: bool) -> None:
    assert is_fit_due(sizes, {"a": 16}, first=16) is expected


@pytest.mark.parametrize(
    ("sizes", "num_elsewhere", "expected"),
    [
        pytest.param({"a": 6, "b": 2}, 0, {"a": 6, "b": 2}, id="one rank has all"),
        pytest.param({"a": 6, "b": 2}, 24, {"a": 24, "b": 8}, id="others have three quarters of all"),
        pytest.param({}, 24, {"": 24}, id="others have all"),
        pytest.param({}, 0, {"": 0}, id="nobody has any"),
    ],
)
def test_clusters_have_the_same_share_of_the_requests_of_all_ranks(
    sizes: dict[str, int], num_elsewhere: int, expected: dict[str, float]
) -> None:
    assert sizes_over_ranks(sizes, num_elsewhere) == expected


@pytest.mark.parametrize(
    ("now", "duration_s", "expected"),
    [
        pytest.param(Progress(step=101, num_held_out=10, at_s=1059.0), 0.0, False, id="soon"),
        pytest.param(Progress(step=101, num_held_out=10, at_s=1060.0), 0.0, True, id="after the time that may be lost"),
        pytest.param(Progress(step=101, num_held_out=10, at_s=1040.0), 20.0, True, id="early, because it takes long"),
        pytest.param(
            Progress(step=101, num_held_out=10, at_s=1000.0), 90.0, True, id="always, because it takes too long"
        ),
        pytest.param(Progress(step=100, num_held_out=11, at_s=9999.0), 20.0, False, id="nothing learned"),
    ],
)
def test_a_save_is_due_so_early_that_it_is_done_in_time(now: Progress, duration_s: float, *, expected: bool) -> None:
    assert is_save_due(now, LAST, PACE, duration_s=duration_s) is expected


def test_a_cluster_that_was_too_small_for_the_last_fit_is_due_as_soon_as_it_is_not() -> None:
    assert not is_fit_due({"old": 100, "new": 15}, {"old": 100, "new": 12}, first=16)
    assert is_fit_due({"old": 100, "new": 16}, {"old": 100, "new": 12}, first=16)


@pytest.mark.parametrize(("num_training", "num_held_out"), [(16, 0), (15, 1), (13, 3), (8, 8)], ids=str)
def test_of_the_first_sixteen_requests_eight_are_fitted_and_eight_judge(num_training: int, num_held_out: int) -> None:
    num_newest = num_newest_judges(num_training, num_judges=8)
    assert num_newest + num_held_out == num_training - num_newest == 8


def test_all_requests_are_fitted_while_held_out_ones_suffice_to_judge() -> None:
    assert num_newest_judges(5, num_judges=8) == 0
    assert num_newest_judges(400, num_judges=8) == 8


def test_refusals_are_followed_by_ever_longer_waits() -> None:
    holdoff = PublishBackoff(15.0)
    assert holdoff.is_over(0.0)
    waits = [holdoff.rejected(0.0) for _ in range(10)]
    assert waits[0] == 15.0
    assert all(b == min(2 * a, MAX_BACKOFF_S) for a, b in pairwise(waits))
    assert not holdoff.is_over(MAX_BACKOFF_S - 1)
    assert holdoff.is_over(MAX_BACKOFF_S)


def test_a_success_ends_the_waiting() -> None:
    holdoff = PublishBackoff(15.0)
    holdoff.rejected(0.0)
    holdoff.reset()
    assert holdoff.is_over(0.0)
    assert holdoff.rejected(0.0) == 15.0


def test_the_next_estimate_is_due_when_nothing_is_left_to_wait_for() -> None:
    now = Progress(step=112, num_held_out=10, at_s=1011.0)
    assert next_estimate(now, LAST, PACE) == (8, 4.0)
    assert next_estimate(now, LAST, PACE, duration_s=10.0) == (8, 29.0)
    assert next_estimate(Progress(step=130, num_held_out=10, at_s=1099.0), LAST, PACE) == (0, 0.0)
    assert next_estimate(now, None, PACE) == (0, 0.0)
