"""A swap during a request: the verify steps of a recorded run, on a scale of milliseconds."""

from itertools import pairwise

from tools.pictures.recorded import Recorded, Step, read
from tools.pictures.svg import WIDTH, Drawing

LEFT, RIGHT = 130.0, WIDTH - 20.0
TICK_MS = 200
AROUND = 5
"""Steps that are shown before the swap begins and after it has ended."""


def picture() -> str:
    """Two lanes: decoding, and what happens in the background meanwhile."""
    recorded = read()
    shown = _shown(recorded)
    start, end = shown[0][0], shown[-1][1].ended_ms
    scale = (RIGHT - LEFT) / (end - start)
    swap = recorded.swap

    def x(ms: float) -> float:
        return LEFT + (ms - start) * scale

    drawing = Drawing("A swap: a new draft is copied in between two steps of a running request", 300)
    drawing.text((20, 26), "One request goes on while its draft is exchanged", style="bold")
    drawing.text((20, 106), "verify steps", color="quiet", size=13)
    colors = {1: "quiet", 2: "good"}
    for began_ms, step in shown:
        width = max(2.0, (step.ended_ms - began_ms) * scale - 1.5)
        drawing.bar((x(began_ms), 84), (width, 34), fill=colors[step.version])
    exchanged = next(step for _, step in shown if step.version == 2)
    at = x(next(began_ms for began_ms, step in shown if step is exchanged))
    drawing.line([(at, 66), (at, 192)], color="plum", width=2)
    drawing.text(
        (at, 56),
        f"decoding pauses for {swap.pause:.1f} ms: the tensors are copied",
        color="plum",
        style="middle",
        size=13,
    )
    drawing.text((20, 180), "background", color="quiet", size=13)
    drawing.box((x(swap.began), 158), (at - x(swap.began), 34), fill="warm-soft", stroke="warm")
    drawing.box((at, 158), (x(swap.ended) - at, 34), fill="target-soft", stroke="target")
    drawing.text((x(swap.began), 150), "read, check and convert version 2", color="warm", size=13)
    drawing.text((x(swap.ended), 212), "hash what the engine now holds", color="target", size=13, style="end")
    drawing.line([(LEFT, 240), (RIGHT, 240)])
    for ms in range(0, int(end - start) + 1, TICK_MS):
        drawing.line([(x(start + ms), 236), (x(start + ms), 244)], color="quiet")
        drawing.text((x(start + ms), 260), f"{ms}", color="quiet", size=12, style="middle")
    drawing.text((RIGHT, 280), "milliseconds", color="quiet", size=12, style="end")
    for number, (version, color) in enumerate(colors.items()):
        drawing.bar((LEFT + 190 * number, 274), (12, 12), fill=color)
        drawing.text((LEFT + 18 + 190 * number, 285), f"drafted by version {version}", color="quiet", size=13)
    return drawing.render()


def _shown(recorded: Recorded) -> list[tuple[float, Step]]:
    """Steps around the swap, each with the time at which it began."""
    steps = recorded.steps
    pairs = [(before.ended_ms, step) for before, step in pairwise(steps)]
    first = next(n for n, (_, step) in enumerate(pairs) if step.ended_ms >= recorded.swap.began)
    last = max(n for n, (began_ms, _) in enumerate(pairs) if began_ms <= recorded.swap.ended)
    return pairs[max(0, first - AROUND) : last + AROUND + 1]
