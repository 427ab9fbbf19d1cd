"""The loop: five parts, and what goes from one to the next, in the order of the README's five steps."""

from tools.pictures.svg import Drawing, Point

BOXES: tuple[tuple[Point, Point, str, str, tuple[str, ...]], ...] = (
    ((20, 70), (110, 74), "Clients", "quiet", ("use the", "OpenAI API")),
    ((250, 60), (210, 94), "Inference pods", "target", ("the draft proposes tokens,", "the target verifies them")),
    ((640, 60), (220, 94), "Registry", "plum", ("versions, gates, rollouts;", "tells pods what to serve")),
    ((250, 290), (210, 94), "Redis stream", "warm", ("traces wait here; serving", "never waits for learning")),
    ((640, 290), (220, 94), "Trainer", "good", ("replays old and new traffic,", "trains the draft, tests it")),
)


def picture() -> str:
    """Who sends what to whom."""
    drawing = Drawing("The loop: inference pods, Redis stream, trainer and registry", 404)
    drawing.text((20, 28), "Serving makes the lessons, and the lessons make serving faster", style="bold")
    for at, size, name, color, lines in BOXES:
        drawing.box(at, size, fill="card" if color == "quiet" else f"{color}-soft", stroke=color)
        drawing.text((at[0] + size[0] / 2, at[1] + 26), name, color=color, size=16, style="middle bold")
        drawing.lines((at[0] + size[0] / 2, at[1] + 48), lines, color="ink", size=12.5, style="middle")
    drawing.line([(132, 96), (246, 96)], color="quiet", width=1.5, arrow=True)
    drawing.text((189, 88), "requests", color="quiet", size=12.5, style="middle")
    drawing.line([(246, 122), (134, 122)], color="quiet", width=1.5, arrow=True)
    drawing.text((189, 138), "tokens", color="quiet", size=12.5, style="middle")
    _step(
        drawing,
        [(355, 156), (355, 286)],
        1,
        "warm",
        (371, 204),
        ("traces of finished requests: which", "draft tokens were accepted, and", "the target's hidden states"),
    )
    _step(drawing, [(462, 337), (636, 337)], 2, "good", (549, 362), ("samples",))
    _step(
        drawing,
        [(720, 286), (720, 158)],
        3,
        "plum",
        (736, 204),
        ("a candidate,", "surely better on", "held-out requests"),
    )
    _step(drawing, [(636, 84), (464, 84)], 4, "target", (549, 68), ("serve version N",))
    _step(drawing, [(464, 128), (636, 128)], 5, "plum", (549, 152), ("the draft I hold, how",))
    drawing.text((549, 168), "much of it is accepted", color="quiet", size=12.5, style="middle")
    return drawing.render()


def _step(drawing: Drawing, points: list[Point], number: int, color: str, at: Point, lines: tuple[str, ...]) -> None:
    """A numbered arrow and what it carries."""
    (x0, y0), (x1, y1) = points
    drawing.line(points, color=color, width=2, arrow=True)
    middle = ((x0 + x1) / 2, (y0 + y1) / 2)
    drawing.dot(middle, color=color, radius=10)
    drawing.text((middle[0], middle[1] + 4.5), str(number), color="card", size=12.5, style="middle bold")
    drawing.lines(at, lines, size=12.5, style="" if x0 == x1 else "middle")
