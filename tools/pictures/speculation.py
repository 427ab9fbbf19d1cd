"""Speculative decoding: verify steps of a recorded request, token by token, from the first that version 2 drafted."""

from tools.pictures.recorded import Step, read
from tools.pictures.svg import WIDTH, Drawing

NUM_STEPS = 8
TOP, ROW, LEFT = 100.0, 40.0, 92.0
CHARACTER = 8.0
"""Width of a monospaced character at size 13."""


def picture() -> str:
    """One row for each forward pass of the target."""
    steps = [step for step in read().steps if step.version == 2][:NUM_STEPS]
    bottom = TOP + ROW * NUM_STEPS
    drawing = Drawing(
        "Speculative decoding: a draft proposes tokens, the target verifies them in one pass", bottom + 66
    )
    drawing.text((20, 26), "Each row is one forward pass of the target", style="bold")
    x = 20.0
    for label, style in (
        ("accepted draft token", "accepted"),
        ("rejected", "rejected"),
        ("dropped after a rejection", "dropped"),
        ("the target's own token", "own"),
    ):
        x = _chip(drawing, x, 44, label, style) + 10
    for number, step in enumerate(steps):
        _row(drawing, TOP + ROW * number, number + 1, step)
    drawing.line([(20, bottom + 2), (WIDTH - 20, bottom + 2)])
    num_tokens = sum(step.accepted + 1 for step in steps)
    drawing.text((20, bottom + 30), f"{num_tokens} tokens in {len(steps)} passes.", style="bold")
    without = f"Without a draft they take {num_tokens} passes, and the text is the same."
    drawing.text((20, bottom + 52), without, color="quiet")
    return drawing.render()


def _row(drawing: Drawing, y: float, number: int, step: Step) -> None:
    drawing.text((20, y + 18), f"pass {number}", color="quiet", size=13)
    x = LEFT
    for place, text in enumerate(step.drafts):
        style = "accepted" if place < step.accepted else "rejected" if place == step.accepted else "dropped"
        x = _chip(drawing, x, y, _visible(text), style) + 6
    _chip(drawing, x + 12, y, _visible(step.bonus), "own")
    count = step.accepted + 1
    drawing.text((WIDTH - 20, y + 18), f"+ {count} token{'s' if count > 1 else ''}", style="end bold")


def _chip(drawing: Drawing, x: float, y: float, text: str, style: str) -> float:
    """A token in a box; returns the right edge."""
    fill, stroke = {
        "accepted": ("good-soft", "good"),
        "rejected": ("bad-soft", "bad"),
        "dropped": ("none", "line"),
        "own": ("target-soft", "target"),
    }[style]
    width = CHARACTER * len(text) + 16
    drawing.box((x, y), (width, 26), fill=fill, stroke=stroke, dashed=style == "dropped")
    drawing.text((x + 8, y + 18), text, color="quiet" if style == "dropped" else "ink", size=13, style="mono")
    if style == "rejected":
        drawing.line([(x + 6, y + 13.5), (x + width - 6, y + 13.5)], color="bad", width=1.5)
    return x + width


def _visible(text: str) -> str:
    """Spaces and line ends as signs."""
    return text.replace(" ", "·").replace("\n", "⏎") or "∅"
