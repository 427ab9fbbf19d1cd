import pytest

from updraft_cli.demo.plan import (
    ALONE_COST,
    MIN_STRETCH_S,
    Arm,
    Plan,
    Segment,
    SegmentName,
    fixed_arms,
    fixed_requests,
    is_last,
    make_plan,
    probe_limit_s,
    stretch_s,
    timed_arms,
    timed_requests,
)


@pytest.fixture
def plan() -> Plan:
    return make_plan(minutes=9, streams=4, seed=0)


def segment(plan: Plan, name: SegmentName) -> Segment:
    return next(part for part in plan.segments if part.name is name)


def test_the_segments_share_all_of_the_time(plan: Plan) -> None:
    ends = [plan.end_s(part.name) for part in plan.segments]
    assert ends == pytest.approx([189.0, 405.0, 540.0])


def test_a_short_run_has_fewer_and_smaller_report_points(plan: Plan) -> None:
    short = make_plan(minutes=2, streams=4, seed=0)
    assert short.num_points < plan.num_points
    assert short.probing.num_prompts < plan.probing.num_prompts
    assert all(part.num_points >= 2 for part in short.segments)


def test_nothing_is_frozen_before_the_shift() -> None:
    assert Arm.FROZEN not in timed_arms(SegmentName.FIRST)
    assert fixed_arms(SegmentName.SHIFTED) == (Arm.ADAPTIVE, Arm.FROZEN)
    assert set(timed_arms(SegmentName.RETURNED)) == set(Arm)


def test_only_the_last_point_of_a_segment_measures_speed(plan: Plan) -> None:
    shifted = segment(plan, SegmentName.SHIFTED)
    assert [is_last(shifted, point) for point in range(4)] == [False] * 3 + [True]
    assert fixed_requests(plan, shifted, 0) == 2 * 40
    assert timed_requests(plan, shifted, 0) == 0


def test_a_request_that_runs_alone_costs_more_than_one_among_others(plan: Plan) -> None:
    assert ALONE_COST > 1
    assert timed_requests(plan, segment(plan, SegmentName.SHIFTED), 3) == 5 * ALONE_COST * 4


def test_a_report_point_measures_enough_held_out_tokens_for_an_error_below_5_percent(plan: Plan) -> None:
    # In percent: the spread between prompts that n-gram lookup shows on math. The error falls with the root of their number.
    spread = 28
    assert spread / plan.probing.num_prompts**0.5 < 5
    assert plan.probing.num_prompts * plan.probing.max_tokens >= 1_000


def test_a_slow_machine_keeps_most_of_a_segment_for_live_traffic(plan: Plan) -> None:
    first = segment(plan, SegmentName.FIRST)
    now_s, live_s = 0.0, 0.0
    for point in range(first.num_points):
        stretch = stretch_s(plan, first, point, now_s=now_s, probe_request_s=1.0)
        live_s += stretch
        now_s += stretch + min(1.0 * fixed_requests(plan, first, point), probe_limit_s(plan, first))
    assert live_s > plan.end_s(first.name) / 3


def test_a_segment_begins_with_a_report_point(plan: Plan) -> None:
    first = segment(plan, SegmentName.FIRST)
    assert stretch_s(plan, first, 0, now_s=0.0, probe_request_s=1.0) == 0.0


def test_stretches_and_report_points_fill_the_segment(plan: Plan) -> None:
    shifted = segment(plan, SegmentName.SHIFTED)
    now_s, cost_s = plan.end_s(SegmentName.FIRST), 0.3
    for point in range(shifted.num_points):
        now_s += stretch_s(plan, shifted, point, now_s=now_s, probe_request_s=cost_s)
        now_s += min(cost_s * fixed_requests(plan, shifted, point), probe_limit_s(plan, shifted))
        now_s += cost_s * timed_requests(plan, shifted, point)
    assert now_s == pytest.approx(plan.end_s(SegmentName.SHIFTED))


def test_a_machine_that_is_late_still_serves_some_traffic(plan: Plan) -> None:
    returned = segment(plan, SegmentName.RETURNED)
    assert stretch_s(plan, returned, 1, now_s=1000.0, probe_request_s=5.0) == MIN_STRETCH_S
