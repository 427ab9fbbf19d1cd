"""The charts of the report. Colours are Okabe and Ito's, and every arm also has its own marker and dash.

Figures are made without pyplot: no display, no global state.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import RcKeyType

from updraft_cli.demo.plan import Arm, SegmentName
from updraft_cli.demo.report import Part, Point, Report, Request, Transition

_COLOURS = {
    Arm.NONE: "#767676",
    Arm.NGRAM: "#009E73",
    Arm.FROZEN: "#D55E00",
    Arm.ADAPTIVE: "#0072B2",
    Arm.AUTO: "#CC79A7",
}
_MARKERS = {Arm.NONE: "", Arm.NGRAM: "s", Arm.FROZEN: "D", Arm.ADAPTIVE: "o", Arm.AUTO: "P"}
_DASHES = {Arm.NONE: ":", Arm.NGRAM: "-.", Arm.FROZEN: "--", Arm.ADAPTIVE: "-", Arm.AUTO: "-"}
LABELS = {
    Arm.NONE: "no speculation",
    Arm.NGRAM: "n-gram lookup",
    Arm.FROZEN: "draft frozen at the shift",
    Arm.ADAPTIVE: "adaptive draft",
    Arm.AUTO: "adaptive draft and lookup",
}
_BACKGROUNDS = ("#FFFFFF", "#F3F0E8", "#FFFFFF")
_INK, _FAINT = "#222222", "#8A8A8A"

_WIDTH_IN = 9.6
_DPI = 160
_SMOOTHED = 8
"""Live requests behind each point of the thin line."""

_RIGHT_MARGIN = 1.012
"""Room for a marker at the end of the last segment."""

_MAX_NUMBERED_SWAPS = 25
"""The numbers of more would overlap."""

_STYLE: dict[RcKeyType, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that the picture is the same everywhere
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
}


def run_chart(report: Report) -> Figure:
    """Acceptance length of every arm, and the speed of live traffic, over live requests; with swaps and the shift."""
    figure, axes = _canvas(6.4, rows=(3, 1))
    below = figure.axes[1]
    _segments(axes, report)
    _swaps(axes, report)
    _live(axes, report)
    axes.axhline(1.0, color=_COLOURS[Arm.NONE], linestyle=_DASHES[Arm.NONE], label=LABELS[Arm.NONE])
    for arm in (Arm.NGRAM, Arm.FROZEN, Arm.ADAPTIVE):
        _line(axes, report, arm)
    axes.set_ylabel("tokens per verify step")
    _headroom(axes, 1.0)
    _legend(axes, columns=3, is_reversed=True)
    _live_speed(below, report)
    below.set_xlabel("live requests served")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def speed_chart(report: Report) -> Figure:
    """Tokens per second at the end of each segment, by arm."""
    figure, axes = _canvas(3.6)
    speeds = report.summary.tokens_per_second
    width = 0.8 / len(Arm)
    for number, arm in enumerate(Arm):
        values = [speeds[arm][segment] or 0.0 for segment in SegmentName]
        places = [place + (number - (len(Arm) - 1) / 2) * width for place in range(len(values))]
        drawn = axes.bar(places, values, width * 0.9, color=_COLOURS[arm], label=LABELS[arm])
        axes.bar_label(drawn, [f"{value:.0f}" if value else "" for value in values], padding=2, fontsize=9)
    domains = {part.name: part.domain for part in report.parts}
    axes.set_xticks(range(len(SegmentName)), [f"{name}: {domains.get(name, '-')}" for name in SegmentName])
    axes.set_ylabel("tokens per second")
    axes.margins(y=0.12)
    _legend(axes, columns=4)
    return figure


def learning_chart(report: Report) -> Figure:
    """The trainer's estimates of its candidates over time, and the registry's decisions."""
    figure, axes = _canvas(3.6)
    _segments(axes, report, is_time=True)
    minutes = [estimate.at_s / 60 for estimate in report.estimates]
    baseline = [estimate.baseline_length for estimate in report.estimates]
    candidate = [estimate.candidate_length for estimate in report.estimates]
    axes.step(minutes, baseline, where="post", color=_FAINT, linestyle="--", label="served draft, on held-out requests")
    axes.plot(minutes, candidate, color=_COLOURS[Arm.ADAPTIVE], marker="o", markersize=3.5, label="candidate")
    low = [e.baseline_length * (1 + e.gain_low_percent / 100) for e in report.estimates]
    high = [e.baseline_length * (1 + e.gain_high_percent / 100) for e in report.estimates]
    axes.fill_between(minutes, low, high, color=_COLOURS[Arm.ADAPTIVE], alpha=0.13, linewidth=0, label="its interval")
    _decisions(axes, report)
    _headroom(axes, 1.0)
    axes.set_ylabel("tokens per verify step")
    axes.set_xlabel("minutes")
    _legend(axes, columns=5)
    return figure


def svg(figure: Figure, name: str) -> str:
    """Return the figure as an `<svg>` element for a page; `name` keeps its ids apart from those of other figures."""
    text = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    found = text.getvalue()
    element = found[found.index("<svg") :]
    return element.replace('id="', f'id="{name}-').replace('"#', f'"#{name}-').replace("url(#", f"url(#{name}-")


def png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG."""
    figure.savefig(path, format="png", dpi=_DPI)


def _canvas(height_in: float, *, rows: tuple[int, ...] = (1,)) -> tuple[Figure, Axes]:
    """Return a figure and its first axes; `rows` are the relative heights of axes that share their x axis."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        all_axes = figure.subplots(len(rows), sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    for axes in all_axes:
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, all_axes[0]


def _segments(axes: Axes, report: Report, *, is_time: bool = False, is_named: bool = True) -> None:
    """Shade the segments and name their traffic."""
    for number, part in enumerate(report.parts):
        start, end = (part.started_s / 60, part.ended_s / 60) if is_time else _requests(report, part)
        end = end * _RIGHT_MARGIN if part is report.parts[-1] else end
        axes.axvspan(start, end, color=_BACKGROUNDS[number % len(_BACKGROUNDS)], zorder=0, linewidth=0)
        if number:
            axes.axvline(start, color=_INK, linewidth=1.1)
        if not is_named:
            continue
        name = part.domain if number == 0 else f"{part.domain} again" if number == 2 else f"shift to {part.domain}"
        axes.annotate(
            name, (start, 1.0), xycoords=("data", "axes fraction"), xytext=(5, -13), textcoords="offset points",
            fontweight="bold",
        )  # fmt: skip
    if report.parts:
        last = report.parts[-1]
        end = last.ended_s / 60 if is_time else _requests(report, last)[1]
        axes.set_xlim(0, max(end, 0.1) * _RIGHT_MARGIN)


def _requests(report: Report, part: Part) -> tuple[float, float]:
    before = sum(other.requests for other in report.parts if other.started_s < part.started_s)
    return before, before + part.requests


def _swaps(axes: Axes, report: Report) -> None:
    """Draw a thin line for each, with the version that it loaded."""
    colour = _COLOURS[Arm.ADAPTIVE]
    for number, swap in enumerate(report.swaps):
        label = "hot swap, to this version" if number == 0 else None
        axes.axvline(swap.after_requests, color=colour, alpha=0.45, linewidth=0.9, dashes=(2, 2), label=label)
        if len(report.swaps) <= _MAX_NUMBERED_SWAPS:
            axes.annotate(
                str(swap.version), (swap.after_requests, 0.0), xycoords=("data", "axes fraction"), xytext=(2, 3),
                textcoords="offset points", fontsize=8, color=colour,
            )  # fmt: skip


def _live(axes: Axes, report: Report) -> None:
    """Draw the smoothed acceptance of live traffic as a thin line: its prompts differ, so the arms do not compare with it."""
    windows = _windows([request for request in report.requests if request.verify_steps])
    axes.plot(
        [window[-1].number for window in windows],
        [sum(r.output_tokens - 1 for r in window) / sum(r.verify_steps for r in window) for window in windows],
        color=_COLOURS[Arm.ADAPTIVE],
        alpha=0.3,
        linewidth=1.2,
        label="live traffic, as the engine drafts",
    )


def _live_speed(axes: Axes, report: Report) -> None:
    """Draw the smoothed speed of live traffic: tokens per second of all streams together."""
    windows = _windows([request for request in report.requests if request.output_tokens and request.duration_s])
    speeds = [report.streams * sum(r.output_tokens for r in w) / sum(r.duration_s for r in w) for w in windows]
    _segments(axes, report, is_named=False)
    axes.plot([window[-1].number for window in windows], speeds, color=_COLOURS[Arm.ADAPTIVE], linewidth=1.5)
    axes.set_ylabel("tokens per second,\nlive traffic")
    axes.set_ylim(bottom=0)


def _windows(requests: Sequence[Request]) -> list[Sequence[Request]]:
    return [requests[end - _SMOOTHED : end] for end in range(_SMOOTHED, len(requests) + 1)]


def _line(axes: Axes, report: Report, arm: Arm) -> None:
    """Draw one line per segment: prompts differ between segments, so a line across them would mean nothing."""
    label: str | None = LABELS[arm]
    for part in report.parts:
        points = [point for point in report.points if point.segment is part.name and _length(point, arm) is not None]
        points = [point for point in points if not point.arms[arm].is_copy]
        numbers = [float(point.after_requests) for point in points]
        lengths = [_length(point, arm) for point in points]
        marks = list(range(len(points)))
        if arm is Arm.NGRAM and len(points) == 1:  # it does not learn, so one value holds for the whole segment
            numbers, lengths = list(_requests(report, part)), lengths * 2
            marks = [1]
        axes.plot(
            numbers, [length or 0.0 for length in lengths], color=_COLOURS[arm], linestyle=_DASHES[arm], linewidth=2.0,
            marker=_MARKERS[arm], markersize=6, markevery=marks, label=label if points else None,
        )  # fmt: skip
        label = None if points else label


def _length(point: Point, arm: Arm) -> float | None:
    return point.arms[arm].acceptance_length if arm in point.arms else None


def _decisions(axes: Axes, report: Report) -> None:
    served = [t for t in report.transitions if t.phase == "stable"]
    refused = [t for t in report.transitions if t.phase in {"rejected", "held", "failed", "rolled back"}]
    _marks(axes, report, served, marker="^", colour=_COLOURS[Arm.NGRAM], label="served")
    _marks(axes, report, refused, marker="X", colour=_COLOURS[Arm.FROZEN], label="not served")


def _marks(
    axes: Axes, report: Report, transitions: Sequence[Transition], *, marker: str, colour: str, label: str
) -> None:
    if transitions and report.estimates:
        heights = [_candidate_at(report, transition.at_s) for transition in transitions]
        minutes = [transition.at_s / 60 for transition in transitions]
        axes.plot(minutes, heights, marker, color=colour, markersize=9, label=label, zorder=5)


def _candidate_at(report: Report, at_s: float) -> float:
    nearest = min(report.estimates, key=lambda estimate: abs(estimate.at_s - at_s))
    return nearest.candidate_length


def _headroom(axes: Axes, low: float) -> None:
    """Start the axis just below `low`, and leave room for the names of the segments."""
    high = max(1.4, axes.get_ylim()[1])
    axes.set_ylim(low - 0.08 * (high - low), high + 0.1 * (high - low))


def _legend(axes: Axes, *, columns: int, is_reversed: bool = False) -> None:
    """Put the legend above the axes; reversed, the topmost line comes first."""
    handles, labels = axes.get_legend_handles_labels()
    turn = -1 if is_reversed else 1
    axes.legend(
        handles[::turn], labels[::turn], loc="lower left", bbox_to_anchor=(0, 1.01), ncols=columns, borderaxespad=0,
        frameon=False,
    )  # fmt: skip
