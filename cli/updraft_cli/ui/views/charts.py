"""The charts: which samples each shows, with the changes of versions as marks. The JSON is described in docs/console.md."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from updraft_cli import output
from updraft_cli.backends.snapshot import SpeculatorSnapshot
from updraft_cli.backends.speculators import Trial
from updraft_cli.ui.samples import Samples
from updraft_cli.ui.views.figures import DOMAIN, DROPPED, MEAN
from updraft_cli.ui.views.parts import version_name

_MARKED = frozenset({"canary", "stable", "rejected", "rolled back", "failed"})
_ROWS = 12
"""Points in the table that stands in for a chart without a script."""
_MARKS = 30
"""Marks listed there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line: a figure by name, or all figures whose names begin with `name`, with `label` before the rest."""

    name: str
    label: str
    is_prefix: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    name: str
    page: str
    title: str
    unit: str
    series: tuple[Series, ...]
    bands: tuple[tuple[str, str, str], ...] = ()
    """(low, high, label), by name of figure: the area between two lines."""
    has_marks: bool = False
    has_zero: bool = False
    """The value axis includes 0."""
    is_of_this_machine: bool = False
    """Its figures are known only of a pod on this machine."""


def _line(name: str, label: str) -> Series:
    return Series(name=name, label=label)


CHARTS = {
    chart.name: chart
    for chart in (
        Chart(
            name="acceptance",
            page="overview",
            title="Acceptance length",
            unit="tokens per verify step",
            series=(
                _line("stable", "version that serves"),
                _line("candidate", "candidate"),
                Series(name=MEAN, label=MEAN, is_prefix=True),
            ),
            has_marks=True,
        ),
        Chart(
            name="domains",
            page="traffic",
            title="Acceptance length by domain, since the start of the pods",
            unit="tokens per verify step",
            series=(Series(name=DOMAIN, label="", is_prefix=True),),
            has_marks=True,
        ),
        Chart(
            name="speedup",
            page="overview",
            title="Speed over decoding without drafts",
            unit="times",
            series=(_line("speedup", "speed"), _line("speedup low", "low"), _line("speedup high", "high")),
            bands=(("speedup low", "speedup high", "90 % interval"),),
            has_marks=True,
        ),
        Chart(
            name="evidence",
            page="rollout",
            title="Candidate against stable: acceptance length",
            unit="% change",
            series=(
                _line("acceptance change", "change"),
                _line("acceptance low", "low"),
                _line("acceptance high", "high"),
            ),
            bands=(("acceptance low", "acceptance high", "confidence sequence"),),
            has_marks=True,
            has_zero=True,
        ),
        Chart(
            name="latency",
            page="rollout",
            title="Candidate against stable: time between tokens",
            unit="% change",
            series=(_line("latency change", "change"), _line("latency low", "low"), _line("latency high", "high")),
            bands=(("latency low", "latency high", "confidence sequence"),),
            has_zero=True,
        ),
        Chart(
            name="loss",
            page="learning",
            title="Loss of the last step",
            unit="nats per token",
            series=(_line("loss", "loss"),),
        ),
        Chart(
            name="held-out",
            page="learning",
            title="Acceptance length on held-out requests",
            unit="tokens per verify step",
            series=(
                _line("held-out candidate", "draft in training"),
                _line("held-out baseline", "draft that serves"),
                _line("trained on", "draft in training on requests that it learned"),
            ),
            has_marks=True,
        ),
        Chart(
            name="throughput",
            page="learning",
            title="Tokens of training",
            unit="tokens per second",
            series=(
                _line("trained tokens", "trained"),
                _line("demand", "demanded"),
                _line("granted", "granted"),
            ),
            has_zero=True,
        ),
        Chart(
            name="lookahead",
            page="traffic",
            title="Draft tokens per step, as the engine chose last",
            unit="tokens",
            series=(_line("lookahead", "lookahead"),),
            has_zero=True,
            is_of_this_machine=True,
        ),
        Chart(
            name="drops",
            page="traffic",
            title="Dropped traces since the pod's start, by reason",
            unit="traces",
            series=(Series(name=DROPPED, label="", is_prefix=True),),
            has_zero=True,
            is_of_this_machine=True,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartTable:
    """A chart's place on a page, with its last points as a table."""

    name: str
    title: str
    unit: str
    labels: tuple[str, ...]
    rows: tuple[tuple[float, tuple[float | None, ...]], ...]
    """(Unix seconds, numbers), newest first."""
    has_marks: bool
    marks: tuple[tuple[float, str], ...]
    """(Unix seconds, label), newest first."""
    frozen: Mapping[str, Any] | None = None
    """Its content, as `content` returns it, on a page that no server follows; None: the page fetches it."""


def charts_of(
    page: str, samples: Samples, one: SpeculatorSnapshot, *, is_on_this_machine: bool = True
) -> tuple[ChartTable, ...]:
    """Return the charts of a page; one that can get no figures here is left out."""
    shown = (chart for chart in CHARTS.values() if is_on_this_machine or not chart.is_of_this_machine)
    return tuple(_table(chart, samples, one) for chart in shown if chart.page == page)


def content(chart: Chart, samples: Samples, one: SpeculatorSnapshot, *, since_s: float) -> dict[str, Any]:
    """Return a chart's points after `since_s` as JSON values."""
    lines = _lines(chart, samples)
    start_s = _start_s(chart, one.speculator.trial)
    times, values = samples.since(max(since_s, start_s), list(lines))
    names = list(lines)
    return {
        "title": chart.title,
        "unit": chart.unit,
        "zero": chart.has_zero,
        "start": _finite(start_s),
        "times": times,
        "series": [
            {"label": label, "values": list(map(_finite, column))}
            for label, column in zip(lines.values(), values, strict=True)
        ],
        "bands": [
            {"low": names.index(low), "high": names.index(high), "label": label} for low, high, label in chart.bands
        ],
        "marks": list(_marks(samples, one)) if chart.has_marks else [],
    }


def _start_s(chart: Chart, trial: Trial | None) -> float:
    """Return where a chart begins: one about a canary with the one that runs, every other with the samples."""
    if chart.page != "rollout" or trial is None or trial.started is None:
        return -math.inf
    return trial.started.timestamp()


def _table(chart: Chart, samples: Samples, one: SpeculatorSnapshot) -> ChartTable:
    lines = _lines(chart, samples)
    times, values = samples.since(_start_s(chart, one.speculator.trial), list(lines))
    return ChartTable(
        name=chart.name,
        title=chart.title,
        unit=chart.unit,
        labels=tuple(lines.values()),
        rows=_rows(times, values),
        has_marks=chart.has_marks,
        marks=_listed(_marks(samples, one) if chart.has_marks else ()),
    )


def _listed(marks: Iterable[Mapping[str, Any]]) -> tuple[tuple[float, str], ...]:
    """Return the newest marks, newest first."""
    return tuple(sorted(((mark["time"], mark["label"]) for mark in marks), reverse=True)[:_MARKS])


def frozen(name: str, content: Mapping[str, Any]) -> ChartTable:
    """Return a chart for a page that no server follows; `content` is as of `content`."""
    return ChartTable(
        name=name,
        title=content["title"],
        unit=content["unit"],
        labels=tuple(line["label"] for line in content["series"]),
        rows=_rows(content["times"], [line["values"] for line in content["series"]]),
        has_marks=bool(content["marks"]),
        marks=_listed(content["marks"]),
        frozen=content,
    )


def _rows(
    times: Sequence[float], values: Sequence[Sequence[float | None]]
) -> tuple[tuple[float, tuple[float | None, ...]], ...]:
    """Return some of the points with a number, newest first."""
    points = zip(times, zip(*values, strict=True), strict=True) if values else ()
    rows = [point for point in points if any(value is not None for value in point[1])]
    step = -(-len(rows) // _ROWS) or 1
    return tuple(rows[::-1][::step])


def _lines(chart: Chart, samples: Samples) -> Mapping[str, str]:
    """Return the labels by name of figure."""
    lines: dict[str, str] = {}
    for series in chart.series:
        if series.is_prefix:
            lines |= {name: series.label + name.removeprefix(series.name) for name in samples.names(series.name)}
        else:
            lines[series.name] = series.label
    return lines


def _marks(samples: Samples, one: SpeculatorSnapshot) -> Iterator[dict[str, Any]]:
    """Yield changes of versions, shifts of the traffic, and swaps of pods."""
    for entry in one.history:
        if entry.phase in _MARKED:
            label = f"version {entry.version} {entry.phase}"
            yield {"time": entry.time.timestamp(), "label": label, "kind": entry.phase}
    for shift in one.speculator.learning.shifts if one.speculator.learning else ():
        yield {"time": shift.time.timestamp(), "label": f"shift from {shift.before} to {shift.after}", "kind": "shift"}
    for swap in samples.swaps.seen:
        label = f"{output.count(swap.num_pods, 'pod')} to {version_name(swap.version)}"
        yield {"time": swap.at_s, "label": label, "kind": "swap"}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
