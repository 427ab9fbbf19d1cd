"""Charts of the main tables of docs/benchmarks.md. The page is the only source of their figures."""

from collections.abc import Sequence
from dataclasses import dataclass

from tools.pictures.svg import WIDTH, Drawing, Point
from tools.pictures.tables import Figure, Table, figure, table

COLORS = ("line", "warm", "quiet", "target", "good")
"""One for each arm of the demo, in the page's order; the default is the green one."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A vertical scale: values from `low` to `high` between two heights, with lines at `ticks`."""

    low: float
    high: float
    top: float
    bottom: float
    ticks: Sequence[float]

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * (value - self.low) / (self.high - self.low)

    def draw(self, drawing: Drawing, left: float, right: float, unit: str = "") -> None:
        for tick in self.ticks:
            drawing.line([(left, self.y(tick)), (right, self.y(tick))])
            drawing.text((left - 8, self.y(tick) + 4), f"{tick:g}{unit}", color="quiet", size=12, style="end")


def demo(page: str) -> str:
    """The demo's arms at the end of each segment: tokens per verify step, and tokens per second."""
    rows = table(page, "One run of the demo")
    drawing = Drawing("One run of the demo: tokens per verify step and tokens per second by drafter", 470)
    _legend(drawing, (60, 26), [head.strip("`") for head in rows.heads[1:]], COLORS)
    panels = (
        ("tokens per verify step", Axis(0, 3, 66, 226, (0, 1, 2, 3))),
        ("tokens per second", Axis(0, 70, 286, 440, (0, 20, 40, 60))),
    )
    for unit, axis in panels:
        drawing.text((60, axis.top - 14), unit, style="bold", size=13)
        axis.draw(drawing, 60, WIDTH - 20)
        for number, segment in enumerate(("code", "shifted to math", "code again")):
            left = 84 + 262 * number
            _bars(drawing, axis, left, [figure(cell) for cell in rows.row(f"{segment}: {unit}")])
            drawing.text((left + 110, axis.bottom + 18), segment, color="quiet", size=13, style="middle")
    return drawing.render()


def _bars(drawing: Drawing, axis: Axis, left: float, figures: Sequence[Figure]) -> None:
    for number, (one, color) in enumerate(zip(figures, COLORS, strict=True)):
        x = left + 44 * number
        drawing.bar((x, axis.y(one.value)), (38, axis.bottom - axis.y(one.value)), fill=color)
        drawing.text(
            (x + 19, axis.y(one.value) - 4), one.text, size=11.5, style="middle bold" if one.is_bold else "middle"
        )


def _legend(drawing: Drawing, at: Point, labels: Sequence[str], colors: Sequence[str]) -> None:
    x, y = at
    for label, color in zip(labels, colors, strict=True):
        drawing.bar((x, y - 11), (12, 12), fill=color)
        drawing.text((x + 18, y), label, size=13)
        x += 36 + 7.2 * len(label)


def learning(page: str) -> str:
    """Acceptance length by the number of requests learned from, for three kinds of traffic."""
    rows = table(page, "Learning from recorded traffic")
    drawing = Drawing("Acceptance length after so many requests, starting without a draft", 350)
    axis = Axis(1.0, 2.0, 56, 300, (1, 1.25, 1.5, 1.75, 2))
    axis.draw(drawing, 60, WIDTH - 20)
    drawing.text(
        (60, 26),
        "tokens per verify step of the draft that serves, on held-out requests (bars: 90 %)",
        style="bold",
        size=13,
    )
    drawing.text((66, axis.y(1.0) - 6), "1: without a draft", color="quiet", size=12)
    counts = [cells[0] for cells in rows.rows if cells[0].isdigit()]
    for kind, color, shift, drop in (("math", "target", -7, 10), ("sql", "good", 0, 4), ("logic*", "plum", 7, -4)):
        points = [(_across(int(count)) + shift, _cell(rows, count, kind)) for count in counts]
        drawing.line([(x, axis.y(one.value)) for x, one in points], color=color, width=2)
        for x, one in points:
            _interval(drawing, axis, x, one, color)
        drawing.text(
            (points[-1][0] + 12 - shift, axis.y(points[-1][1].value) + drop), kind, color=color, size=13, style="bold"
        )
    for count in counts:
        drawing.text((_across(int(count)), 320), count, color="quiet", size=12, style="middle")
    drawing.text((WIDTH - 20, 340), "requests", color="quiet", size=12, style="end")
    return drawing.render()


def _across(requests: int) -> float:
    return 60 + 7.2 * requests


def _cell(rows: Table, label: str, head: str) -> Figure:
    return figure(rows.row(label)[rows.heads.index(head) - 1])


def _interval(drawing: Drawing, axis: Axis, x: float, one: Figure, color: str) -> None:
    if one.low is not None and one.high is not None:
        drawing.line([(x, axis.y(one.low)), (x, axis.y(one.high))], color=color, width=2)
    drawing.dot((x, axis.y(one.value)), color=color)


def default_drafter(page: str) -> str:
    """Speed of `auto` over no speculation, with the lowest and the highest domain."""
    rows = table(page, "The default drafter")
    drawing = Drawing("Speed of the default drafter over no speculation", 340)
    axis = Axis(0.75, 3.25, 70, 280, (0.75, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.25))
    axis.draw(drawing, 70, WIDTH - 20, "x")
    drawing.line([(70, axis.y(1)), (WIDTH - 20, axis.y(1))], color="ink", width=1.5)
    drawing.text((60, 26), "speed over no speculation: median, lowest and highest domain", style="bold", size=13)
    arms = (("with the draft, over none", "good", -22), ("without a draft, over none", "warm", 22))
    _legend(
        drawing, (60, 50), [head.removesuffix(", over none") for head, _, _ in arms], [color for _, color, _ in arms]
    )
    for number, cells in enumerate(rows.rows):
        middle = 70 + (WIDTH - 90) * (number + 0.5) / len(rows.rows)
        for head, color, shift in arms:
            one = _cell(rows, cells[0], head)
            _interval(drawing, axis, middle + shift, one, color)
            drawing.text((middle + shift + 8, axis.y(one.value) + 4), one.text, size=12)
        drawing.lines((middle, 302), cells[0].split(", "), size=12.5, style="middle")
    return drawing.render()


def fleet(page: str) -> str:
    """The costs of 10, 100 and 1,000 pods for one registry, each as a share of its bar."""
    rows = table(page, "A fleet on one registry")
    drawing = Drawing("A registry with 10, 100 and 1,000 pods, against its bars", 250)
    drawing.text((20, 26), "share of the bar for 1,000 pods", style="bold", size=13)
    pods = rows.heads[1:4]
    _legend(drawing, (300, 26), [f"{count} pods" for count in pods], ("line", "warm", "target"))
    measures = (
        ("New version, slowest of 3", "a new version serves everywhere"),
        ("Memory of the registry, steady", "memory"),
        ("Processor time of the registry, steady, of one core", "processor time"),
    )
    for number, (label, name) in enumerate(measures):
        cells = rows.row(label)
        limit = figure(cells[3]).value
        top = 48 + 64 * number
        drawing.text((20, top + 28), name, size=13)
        for place, (cell, color) in enumerate(zip(cells[:3], ("line", "warm", "target"), strict=True)):
            width = 400 * figure(cell).value / limit
            drawing.bar((300, top + 16 * place), (width, 13), fill=color)
            drawing.text((306 + width, top + 11 + 16 * place), cell, color="quiet", size=11.5)
        drawing.text((706, top + 28), f"bar: {cells[3]}", size=13)
    drawing.line([(700, 42), (700, 236)], color="ink", width=1.5)
    return drawing.render()
