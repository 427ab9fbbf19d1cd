import math
from collections.abc import Mapping

import pytest
from tests.support.demo_run import answer, measured, recorded, report_of

from updraft_cli.demo.plan import Arm, SegmentName
from updraft_cli.demo.report import ArmResult, Measured, Point, Report, Swap, acceptance_error_percent
from updraft_cli.demo.summary import drafter_remarks, headline, kept_percent, lowest, summarise


@pytest.fixture
def report() -> Report:
    return report_of(recorded())


def point(segment: SegmentName, at_s: float, lengths: Mapping[Arm, float], *, is_start: bool = False) -> Point:
    return Point(
        number=1,
        segment=segment,
        domain="code",
        is_start=is_start,
        is_end=False,
        at_s=at_s,
        duration_s=1.0,
        after_requests=0,
        arms={arm: ArmResult.of(measured(length, version=1), None) for arm, length in lengths.items()},
    )


def swap(at_s: float) -> Swap:
    return Swap(at_s=at_s, after_requests=0, version=1)


def test_the_value_of_a_segment_is_that_of_its_last_point(report: Report) -> None:
    adaptive = report.summary.acceptance_length[Arm.ADAPTIVE]
    last = [point for point in report.points if point.segment is SegmentName.SHIFTED][-1]
    assert adaptive[SegmentName.SHIFTED] == last.arms[Arm.ADAPTIVE].acceptance_length
    mean = report.summary.acceptance_length_mean[Arm.ADAPTIVE][SegmentName.SHIFTED]
    assert mean is not None
    assert 1.2 < mean < (adaptive[SegmentName.SHIFTED] or 0)


def test_every_arm_and_segment_has_a_place_in_the_summary(report: Report) -> None:
    for table in (report.summary.acceptance_length, report.summary.tokens_per_second):
        assert set(table) == set(Arm)
        assert all(set(row) == set(SegmentName) for row in table.values())


def test_a_run_as_hoped_for_meets_the_bars_on_gain_speed_and_time(report: Report) -> None:
    met = {bar.name: bar.met for bar in report.bars}
    assert met.pop("acceptance length over the frozen draft, lowest after the first swap") is False
    assert all(met.values())


def test_a_run_that_was_stopped_has_not_met_what_it_has_not_measured() -> None:
    stopped = report_of(recorded(segments=1), stopped_by="it was stopped by hand.")
    assert not stopped.is_complete
    unmeasured = [bar for bar in stopped.bars if bar.measured is None]
    assert len(unmeasured) == 5
    assert not any(bar.met for bar in unmeasured)
    assert headline(stopped).startswith("The run ended before")


def test_failed_requests_of_traffic_and_of_report_points_are_counted_together() -> None:
    recording = recorded()
    recording.add_request(answer(error="HTTP 500"), started_s=0.0)
    summary = summarise(recording, set_up_s=1.0, total_s=2.0)
    assert summary.failed_requests == 1
    assert summary.requests == len(recording.requests)


def test_the_error_of_a_point_is_the_spread_over_its_requests() -> None:
    same = [answer(1.5) for _ in range(8)]
    assert acceptance_error_percent(same) == 0.0
    spread = [answer(length) for length in (1.2, 1.8) for _ in range(4)]
    error = acceptance_error_percent(spread)
    assert error is not None
    assert error == pytest.approx(100 * 0.2 / math.sqrt(8 - 1), rel=0.1), "one standard deviation is a fifth of 1.44"
    assert acceptance_error_percent(spread * 4) == pytest.approx(error / 2, rel=0.1)
    assert acceptance_error_percent(same[:1]) is None


def test_a_point_with_too_large_an_error_misses_a_bar() -> None:
    recording = recorded()
    point = recording.points[-1]
    wide = [answer(length, version=1) for length in (1.0, 3.0)]
    arm = ArmResult.of(Measured.of(wide, 1.0), None)
    recording.points[-1] = point.model_copy(update={"arms": point.arms | {Arm.ADAPTIVE: arm}})
    report = report_of(recording)
    (bar,) = [bar for bar in report.bars if bar.name.startswith("standard error")]
    assert not bar.met
    assert bar.measured == report.summary.acceptance_error_percent


def test_the_report_tells_the_speed_of_the_default_and_where_one_of_its_parts_was_faster(report: Report) -> None:
    default, faster = drafter_remarks(report)
    assert "(--drafter auto): 1.45 times as fast as no speculation in first (code)" in default
    assert "1.05 times as fast with `--drafter ngram` in first (code)" in faster
    assert "eagle3" not in faster


def test_copies_of_the_adaptive_draft_are_not_counted_as_requests(report: Report) -> None:
    sent = [
        measured.requests
        for point in report.points
        for arm in point.arms.values()
        for measured in (arm.fixed, arm.timed)
        if measured and not arm.is_copy
    ]
    assert report.summary.probe_requests == sum(sent)


def test_points_before_the_first_swap_after_the_shift_are_not_held_against_the_draft() -> None:
    both = {Arm.ADAPTIVE: 1.2, Arm.FROZEN: 1.5}
    points = [
        point(SegmentName.SHIFTED, 10.0, both, is_start=True),
        point(SegmentName.SHIFTED, 20.0, both),
        point(SegmentName.SHIFTED, 30.0, {Arm.ADAPTIVE: 1.5, Arm.FROZEN: 1.2}),
        point(SegmentName.RETURNED, 40.0, {Arm.ADAPTIVE: 1.5, Arm.FROZEN: 1.5}),
    ]
    assert lowest(points, [swap(5.0), swap(25.0)]) == pytest.approx(0.0)
    assert lowest(points, [swap(5.0), swap(15.0)]) == pytest.approx(-20.0)
    assert lowest(points, [swap(5.0)]) is None


def test_what_is_kept_is_measured_at_once_on_the_return() -> None:
    points = [
        point(SegmentName.FIRST, 0.0, {Arm.ADAPTIVE: 1.2}, is_start=True),
        point(SegmentName.FIRST, 1.0, {Arm.ADAPTIVE: 1.5}),
        point(SegmentName.RETURNED, 2.0, {Arm.ADAPTIVE: 1.2}, is_start=True),
        point(SegmentName.RETURNED, 3.0, {Arm.ADAPTIVE: 1.5}),
    ]
    assert kept_percent(points) == pytest.approx(80.0)


def test_without_a_draft_on_the_first_domain_there_is_nothing_to_keep() -> None:
    none = ArmResult.of(measured(1.0, version=0), None)
    points = [
        point(segment, at_s, {}, is_start=True).model_copy(update={"arms": {Arm.ADAPTIVE: none}})
        for at_s, segment in enumerate(SegmentName)
    ]
    assert kept_percent(points) is None


def test_the_headline_tells_gain_swaps_and_failures(report: Report) -> None:
    told = headline(report)
    assert "1.71 tokens per verify step: 43 % more than the same draft frozen at the shift (1.20)" in told
    assert told.endswith("It was swapped 5 times while serving, and no request failed.")


def test_the_headline_of_a_run_without_any_draft_claims_nothing() -> None:
    recording = recorded()
    recording.swaps.clear()
    assert headline(report_of(recording)).startswith("No draft had been good enough")
