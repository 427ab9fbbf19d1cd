"""The report's charts: those of the console at the end of the run, and two of the report's own in the same form.

Their form is what the console's pages fetch, so the same code draws them; docs/console.md describes it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx

from updraft_cli.demo.plan import Arm
from updraft_cli.demo.report import Part, Point, Report, Request
from updraft_cli.local.plan import SPECULATOR
from updraft_cli.ui.views.charts import CHARTS

Content = dict[str, Any]
"""As `updraft_cli.ui.views.charts.content` returns it."""

LABELS = {
    Arm.ADAPTIVE: "adaptive draft",
    Arm.FROZEN: "draft frozen at the shift",
    Arm.NGRAM: "n-gram lookup",
    Arm.AUTO: "adaptive draft and lookup",
    Arm.NONE: "no speculation",
}
_DRAWN = (Arm.ADAPTIVE, Arm.FROZEN, Arm.NGRAM, Arm.NONE)
"""Arms whose acceptance length is measured, and the one that has 1 by definition."""

_SMOOTHED = 8
"""Live requests behind each point of their speed."""

_TIMEOUT_S = 1.0
"""The run is over, and waits for this."""
_SOME_TIME_S = 1e9
"""Numbers above this are Unix times."""


def read(consoles: Sequence[str]) -> dict[str, Content]:
    """Return the charts with figures of the console at the last of these addresses, as many as it answers in time."""
    found = dict[str, Content]()
    if not consoles:
        return found
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(consoles[-1]))
    with (
        httpx.Client(base_url=origin, timeout=_TIMEOUT_S, trust_env=False) as http,
        suppress(httpx.HTTPError, ValueError),  # the rest would not answer either
    ):
        http.get(consoles[-1])  # the token becomes a cookie
        for name in CHARTS:
            answer = http.get(f"/s/{SPECULATOR}/charts/{name}.json")
            if answer.is_success and _has_figures(content := json.loads(answer.text, parse_float=_rounded)):
                found[name] = content
    return found


def _rounded(number: str) -> float:
    """Return a time to the millisecond, and any other figure to six digits."""
    value = float(number)
    return round(value, 3) if value > _SOME_TIME_S else float(f"{value:.6g}")


def _has_figures(content: Content) -> bool:
    return any(value is not None for line in content["series"] for value in line["values"])


def arms(report: Report) -> Content:
    """Acceptance length of the arms at the report points, with shifts, swaps and versions.

    Prompts differ between segments, so a line across them would mean nothing: each segment begins after a gap.
    """
    times, columns = list[float](), {arm: list[float | None]() for arm in _DRAWN}
    for part in report.parts:
        points = [point for point in report.points if point.segment is part.name]
        if times and points:
            times.append(part.started_s)
            for column in columns.values():
                column.append(None)
        times += [point.at_s for point in points]
        for arm, column in columns.items():
            column.extend(_lengths(points, arm))
    return _content(report, "Acceptance length on the same held-out prompts", "tokens per verify step", times, columns)


def _lengths(points: Sequence[Point], arm: Arm) -> list[float | None]:
    if arm is Arm.NONE:
        return [1.0 for _ in points]
    return [_length(point, arm) for point in points]


def _length(point: Point, arm: Arm) -> float | None:
    """None also for the frozen draft before the shift, which is the adaptive one."""
    result = point.arms.get(arm)
    return None if result is None or result.is_copy else result.acceptance_length


def live_speed(report: Report) -> Content:
    """Tokens per second of all streams of live traffic together, over the last few requests."""
    good = [request for request in report.requests if request.output_tokens and request.duration_s]
    windows = [good[end - _SMOOTHED : end] for end in range(_SMOOTHED, len(good) + 1)]
    points = {_ended_s(window): report.streams * _speed(window) for window in windows}
    times = sorted(points)
    speeds: dict[Arm, list[float | None]] = {Arm.AUTO: [points[at_s] for at_s in times]}
    return {**_content(report, "Speed of the live traffic", "tokens per second", times, speeds), "zero": True}


def _ended_s(window: Sequence[Request]) -> float:
    return max(request.started_s + request.duration_s for request in window)


def _speed(window: Iterable[Request]) -> float:
    """Tokens per second of one stream."""
    requests = list(window)
    return sum(request.output_tokens for request in requests) / sum(request.duration_s for request in requests)


def _content(
    report: Report, title: str, unit: str, times: Sequence[float], columns: dict[Arm, list[float | None]]
) -> Content:
    start_s = report.started.timestamp()
    return {
        "title": title,
        "unit": unit,
        "zero": False,
        "start": None,
        "times": [round(start_s + at_s, 3) for at_s in times],
        "series": [{"label": LABELS[arm], "values": values} for arm, values in columns.items()],
        "bands": [],
        "marks": [{**mark, "time": start_s + mark["time"]} for mark in _marks(report)],
    }


def elapsed(content: Content, report: Report) -> Content:
    """Return the same chart in seconds since the start of the run, from its start to its end."""
    start_s, end_s = report.started.timestamp(), report.parts[-1].ended_s if report.parts else 0.0
    rows = zip(content["times"], *(line["values"] for line in content["series"]), strict=True)
    points = [(round(at_s - start_s, 3), values) for at_s, *values in rows if at_s >= start_s]
    nothing = [None for _ in content["series"]]
    before = [(0.0, nothing)] if not points or points[0][0] > 0.0 else []
    after = [(end_s, nothing)] if not points or points[-1][0] < end_s else []
    times, columns = zip(*((at_s, values) for at_s, values in (*before, *points, *after)), strict=True)
    return {
        **content,
        "elapsed": True,
        "times": list(times),
        "series": [
            {**line, "values": list(column)}
            for line, column in zip(content["series"], zip(*columns, strict=True), strict=True)
        ],
        "marks": [{**mark, "time": mark["time"] - start_s} for mark in content["marks"] if mark["time"] >= start_s],
    }


def _marks(report: Report) -> Iterator[dict[str, Any]]:
    for number, part in enumerate(report.parts):
        if number:
            yield {"time": part.started_s, "label": _shift(number, part), "kind": "shift"}
    for transition in report.transitions:
        if transition.phase == "stable":
            yield {"time": transition.at_s, "label": f"version {transition.version}", "kind": "stable"}
    for swap in report.swaps:
        yield {"time": swap.at_s, "label": f"swap to version {swap.version}", "kind": "swap"}


def _shift(number: int, part: Part) -> str:
    return f"{part.domain} again" if number == 2 else f"shift to {part.domain}"
