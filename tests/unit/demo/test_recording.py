import pytest
from tests.support.clock import ManualClock
from tests.support.demo_run import answer, measured, recorded

from updraft_cli.demo.plan import Arm, SegmentName, fixed_arms, fixed_requests, make_plan, timed_arms, timed_requests
from updraft_cli.demo.recording import Recording
from updraft_cli.demo.report import Estimate, Measured


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def recording(clock: ManualClock) -> Recording:
    made = Recording(plan=make_plan(minutes=9, streams=4, seed=0), clock=clock)
    made.begin(SegmentName.FIRST, "code")
    return made


def estimate(*, at_s: float = 0.0, steps: int = 1, candidate: float = 1.2) -> Estimate:
    return Estimate(
        at_s=at_s,
        optimizer_steps=steps,
        loss=1.0,
        candidate_length=candidate,
        baseline_length=1.0,
        gain_percent=20.0,
        gain_low_percent=15.0,
        gain_high_percent=25.0,
    )


def test_acceptance_length_leaves_out_the_first_token_of_each_request() -> None:
    assert measured(1.5, num=2).acceptance_length == pytest.approx(2 * 60 / (2 * 40))


def test_an_answer_that_failed_counts_as_failed_and_nowhere_else() -> None:
    both = Measured.of([answer(2.0), answer(error="HTTP 500")], wall_s=2.0)
    assert (both.requests, both.failed) == (2, 1)
    assert both.acceptance_length == 2.0
    assert both.tokens_per_second == pytest.approx(61 / 2)


def test_nothing_measured_is_null_and_not_zero() -> None:
    failed = Measured.of([answer(error="no answer")], wall_s=1.0)
    assert failed.acceptance_length is None
    assert failed.tokens_per_second is None
    assert failed.max_gap_s is None


def test_requests_belong_to_the_segment_in_which_they_ended(recording: Recording) -> None:
    recording.add_request(answer(), started_s=0.0)
    recording.end()
    recording.begin(SegmentName.SHIFTED, "math")
    recording.add_request(answer(), started_s=0.0)
    assert [(request.number, request.domain) for request in recording.requests] == [(1, "code"), (2, "math")]


def test_before_the_shift_the_frozen_draft_is_the_adaptive_one(recording: Recording) -> None:
    recording.add_point({Arm.ADAPTIVE: measured(1.4, version=2)}, {}, is_start=True, is_end=False, started_s=0.0)
    arms = recording.points[0].arms
    assert arms[Arm.FROZEN].acceptance_length == arms[Arm.ADAPTIVE].acceptance_length
    assert (arms[Arm.FROZEN].is_copy, arms[Arm.ADAPTIVE].is_copy) == (True, False)
    assert arms[Arm.FROZEN].draft_version == 2


def test_acceptance_comes_from_the_fixed_lookahead_and_speed_from_the_free_one(recording: Recording) -> None:
    fixed, timed = measured(1.5), measured(1.2, speed=33.0)
    recording.add_point({Arm.ADAPTIVE: fixed}, {Arm.ADAPTIVE: timed}, is_start=False, is_end=True, started_s=0.0)
    adaptive = recording.points[0].arms[Arm.ADAPTIVE]
    assert adaptive.acceptance_length == 1.5
    assert adaptive.tokens_per_second == pytest.approx(33.0)


def test_the_price_of_report_points_is_learnt(recording: Recording, clock: ManualClock) -> None:
    clock.advance(8.0)
    recording.add_point({Arm.ADAPTIVE: measured(1.0, num=4)}, {}, is_start=True, is_end=False, started_s=0.0)
    assert recording.probe_request_s == pytest.approx(2.0)


def test_the_plan_reckons_with_report_points_as_they_are_measured(recording: Recording, clock: ManualClock) -> None:
    first = recording.plan.segments[0]
    probing = recording.plan.probing
    fixed = {arm: measured(1.0, num=probing.num_prompts) for arm in fixed_arms(first.name, is_end=True)}
    timed = {arm: measured(1.0, num=probing.num_timed) for arm in timed_arms(first.name)}
    clock.advance(56.0)
    recording.add_point(fixed, timed, is_start=False, is_end=True, started_s=0.0)
    last = first.num_points - 1
    planned = fixed_requests(recording.plan, first, last) + timed_requests(recording.plan, first, last)
    assert recording.probe_request_s * planned == pytest.approx(56.0)


def test_a_swap_is_noted_once(recording: Recording) -> None:
    recording.add_request(answer(), started_s=0.0)
    for version in (0, 1, 1, 2):
        recording.note_served(version)
    assert [(swap.version, swap.after_requests) for swap in recording.swaps] == [(1, 1), (2, 1)]


def test_an_estimate_that_says_nothing_new_only_moves_the_step(recording: Recording) -> None:
    recording.note_estimate(estimate(steps=10))
    recording.note_estimate(estimate(at_s=1.0, steps=12))
    recording.note_estimate(estimate(at_s=2.0, steps=20, candidate=1.3))
    assert [e.candidate_length for e in recording.estimates] == [1.2, 1.3]
    assert recording.optimizer_steps == 20


def test_a_segment_tells_its_own_requests_and_speed() -> None:
    part = recorded().part(SegmentName.SHIFTED)
    assert part is not None
    assert part.requests == 3 * 28
    assert part.tokens_per_second == pytest.approx(3 * 28 * 61 / part.live_s, rel=1e-3)
