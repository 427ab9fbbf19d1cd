"""From a recording to the report: the main numbers, the bars, and a sentence with the result. Pure."""

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, itemgetter
from statistics import fmean

from updraft_cli import results
from updraft_cli.demo.plan import Arm, SegmentName
from updraft_cli.demo.recording import Recording
from updraft_cli.demo.report import ArmResult, ByArm, Measured, Point, Report, Summary, Swap
from updraft_cli.results import Bar

Value = Callable[[ArmResult], float | None]
Choice = Callable[[Sequence[float]], float]

_acceptance: Value = attrgetter("acceptance_length")
_speed: Value = attrgetter("tokens_per_second")
_last: Choice = itemgetter(-1)

MIN_GAIN_PERCENT = 25.0
MIN_KEPT_PERCENT = 90.0
MAX_ERROR_PERCENT = 5.0
MAX_TOTAL_MINUTES = 15.0
MAX_SET_UP_MINUTES = 6.0

_CLEARLY = 1.02
"""Speeds closer to each other are not told apart: the prompts are few."""


def summarise(recording: Recording, *, set_up_s: float, total_s: float) -> Summary:
    points = recording.points
    probed = [measured for point in points for arm in point.arms.values() for measured in _measured(arm)]
    failed_probes = sum(measured.failed for measured in probed)
    return Summary(
        acceptance_length=_table(points, _acceptance, _last),
        acceptance_length_mean=_table(points, _acceptance, _mean),
        tokens_per_second=_table(points, _speed, _last),
        tokens_per_second_mean=_table(points, _speed, _mean),
        acceptance_error_percent=_largest_error(points),
        swaps=len(recording.swaps),
        swap_pause_mean_s=recording.swap_pause_mean_s,
        requests=len(recording.requests),
        probe_requests=sum(measured.requests for measured in probed),
        failed_requests=sum(bool(request.error) for request in recording.requests) + failed_probes,
        restarts=len(recording.restarts),
        set_up_s=round(set_up_s, 1),
        total_s=round(total_s, 1),
    )


def bars(summary: Summary, points: Sequence[Point], swaps: Sequence[Swap]) -> tuple[Bar, ...]:
    """Return the requirements, and whether each is met."""
    shifted, returned = SegmentName.SHIFTED, SegmentName.RETURNED
    lengths, speeds = summary.acceptance_length, summary.tokens_per_second
    gain = _percent_above(lengths[Arm.ADAPTIVE][shifted], lengths[Arm.FROZEN][shifted])
    return (
        results.at_least("acceptance length over the frozen draft, at the end of shifted", gain, MIN_GAIN_PERCENT, "%"),
        results.at_least(
            "acceptance length over the frozen draft, lowest after the first swap", lowest(points, swaps), 0.0, "%"
        ),
        results.at_least(
            "acceptance length when the first domain returns, of its best there",
            kept_percent(points),
            MIN_KEPT_PERCENT,
            "%",
        ),
        results.above(
            "tokens/s over no speculation, math",
            _ratio(speeds[Arm.ADAPTIVE][shifted], speeds[Arm.NONE][shifted]),
            1.0,
            "x",
        ),
        results.above(
            "tokens/s over no speculation, code",
            _ratio(speeds[Arm.ADAPTIVE][returned], speeds[Arm.NONE][returned]),
            1.0,
            "x",
        ),
        results.at_most(
            "standard error of an acceptance length, largest report point",
            summary.acceptance_error_percent,
            MAX_ERROR_PERCENT,
            "%",
        ),
        results.at_most("failed requests", float(summary.failed_requests), 0.0),
        results.at_most("set-up", summary.set_up_s / 60, MAX_SET_UP_MINUTES, "min"),
        results.at_most("set-up, run and report", summary.total_s / 60, MAX_TOTAL_MINUTES, "min"),
    )


def lowest(points: Sequence[Point], swaps: Sequence[Swap]) -> float | None:
    """Return the lowest gain of adaptive over frozen in percent, from the first swap after the shift."""
    shift = _start(points, SegmentName.SHIFTED)
    if shift is None:
        return None
    swapped_s = min((swap.at_s for swap in swaps if swap.at_s > shift.at_s), default=None)
    if swapped_s is None:
        return None
    gains = (
        _percent_above(_acceptance(point.arms[Arm.ADAPTIVE]), _acceptance(point.arms[Arm.FROZEN]))
        for point in points
        if point.at_s > swapped_s
    )
    return min((gain for gain in gains if gain is not None), default=None)


def kept_percent(points: Sequence[Point]) -> float | None:
    """Return adaptive's value when the first domain returns, in percent of its best value there; None without a draft."""
    back = _start(points, SegmentName.RETURNED)
    first = [point.arms[Arm.ADAPTIVE] for point in points if point.segment is SegmentName.FIRST]
    lengths = [arm.acceptance_length for arm in first if arm.draft_version and arm.acceptance_length]
    kept = _ratio(_acceptance(back.arms[Arm.ADAPTIVE]), max(lengths)) if back and lengths else None
    return None if kept is None else 100 * kept


def headline(report: Report) -> str:
    """Return the result in one sentence."""
    summary, shifted = report.summary, SegmentName.SHIFTED
    adaptive = summary.acceptance_length[Arm.ADAPTIVE][shifted]
    frozen = summary.acceptance_length[Arm.FROZEN][shifted]
    gain = _percent_above(adaptive, frozen)
    if adaptive is None or frozen is None or gain is None:
        return "The run ended before the traffic had shifted and settled, so there is no result yet."
    if not summary.swaps:
        return "No draft had been good enough to serve when the run ended, so there is nothing to compare: it was too short."
    failed = summary.failed_requests
    outcome = "and no request failed" if not failed else f"and {failed} request{'s' * (failed > 1)} failed"
    how = "more" if gain >= 0 else "less"
    return (
        f"After the traffic shifted from code to math, the draft that kept learning gave {adaptive:.2f} tokens per verify"
        f" step: {abs(gain):.0f} % {how} than the same draft frozen at the shift ({frozen:.2f}). It was swapped"
        f" {summary.swaps} time{'s' * (summary.swaps != 1)} while serving, {outcome}."
    )


def ratio(report: Report, segment: SegmentName, arm: Arm, to: Arm) -> float | None:
    """Return the speed of `arm` over that of `to` at the end of a segment."""
    speeds = report.summary.tokens_per_second
    return _ratio(speeds[arm][segment], speeds[to][segment])


def drafter_remarks(report: Report) -> list[str]:
    """Return what `updraft up` does by default and how fast that is, and where one of its parts was faster."""
    default = "By default, `updraft up` mixes the learned draft with n-gram lookup (--drafter auto)"
    speeds = [
        f"{value:.2f} times as fast as no speculation in {part.name} ({part.domain})"
        for part in report.parts
        if (value := ratio(report, part.name, Arm.AUTO, Arm.NONE)) is not None
    ]
    remarks = [f"{default}: {', '.join(speeds)}." if speeds else f"{default}."]
    names = {Arm.NGRAM: "ngram", Arm.ADAPTIVE: "eagle3"}
    faster = [
        f"{value:.2f} times as fast with `--drafter {name}` in {part.name} ({part.domain})"
        for part in report.parts
        for arm, name in names.items()
        if (value := ratio(report, part.name, arm, Arm.AUTO)) is not None and value > _CLEARLY
    ]
    if faster:
        remarks.append(f"One of the two alone was faster on this traffic: {', '.join(faster)}.")
    return remarks


def _largest_error(points: Sequence[Point]) -> float | None:
    measured = (point.arms[Arm.ADAPTIVE].fixed for point in points if Arm.ADAPTIVE in point.arms)
    errors = [found.acceptance_error_percent for found in measured if found is not None]
    return max((error for error in errors if error is not None), default=None)


def _mean(values: Sequence[float]) -> float:
    return round(fmean(values), 4)


def _table(points: Sequence[Point], value: Value, choose: Choice) -> ByArm:
    def cell(arm: Arm, segment: SegmentName) -> float | None:
        values = _values((point for point in points if point.segment is segment), arm, value)
        return choose(values) if values else None

    return {arm: {segment: cell(arm, segment) for segment in SegmentName} for arm in Arm}


def _values(points: Iterable[Point], arm: Arm, value: Value) -> list[float]:
    found = (value(point.arms[arm]) for point in points if arm in point.arms)
    return [number for number in found if number is not None]


def _measured(arm: ArmResult) -> list[Measured]:
    """Return the measurements that were really sent for an arm."""
    return [] if arm.is_copy else [measured for measured in (arm.fixed, arm.timed) if measured is not None]


def _start(points: Sequence[Point], segment: SegmentName) -> Point | None:
    return next((point for point in points if point.segment is segment and point.is_start), None)


def _ratio(value: float | None, to: float | None) -> float | None:
    return value / to if value is not None and to else None


def _percent_above(value: float | None, base: float | None) -> float | None:
    ratio = _ratio(value, base)
    return None if ratio is None else 100 * (ratio - 1)
