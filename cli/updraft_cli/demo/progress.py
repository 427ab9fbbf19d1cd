"""Progress of the demo: a redrawn line for each segment; in a pipe, a plain line every few seconds."""

import asyncio
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from updraft_cli.demo.plan import Segment
from updraft_cli.demo.recording import Recording
from updraft_cli.demo.report import Part, Request, acceptance_length
from updraft_cli.local.process import Changed, Event, State

_REDRAW_S = 0.5
_PLAIN_EVERY_S = 10.0

_BLOCKS = "▁▂▃▄▅▆▇█"
_NUM_RECENT = 10
"""Requests behind the displayed number: some 500 verify steps."""
_SPARK_WIDTH = 24
_SPARK_HIGH = 2.5
"""Tokens per verify step at a full block; few requests exceed it."""


class Progress:
    def __init__(self, console: Console, recording: Recording) -> None:
        self._console = console
        self._recording = recording

    def listen(self, event: Event) -> None:
        """Report processes that are ready, and record those that had to be restarted."""
        if not isinstance(event, Changed):
            return
        name = event.process.name
        if event.state is State.READY:
            self._console.print(f"  {name} ready in {event.after_s:.1f} s", style="dim")
        if event.state is State.RESTARTING:
            self._recording.restarts.append(f"{name} {event.reason}")
            self._console.print(f"  {name} {event.reason}; it is restarted", style="bold yellow")

    async def run(self) -> None:
        """Show it until cancelled."""
        if self._console.is_terminal:
            with Live(console=self._console, auto_refresh=False) as live:
                while True:
                    live.update(progress_view(self._recording), refresh=True)
                    await asyncio.sleep(_REDRAW_S)
        while True:
            await asyncio.sleep(_PLAIN_EVERY_S)
            self._console.print(progress_line(self._recording), highlight=False, soft_wrap=True)


def progress_view(recording: Recording) -> Group:
    """Return a line for each segment, and one for the current activity."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("segment", "traffic", "tokens per verify step", "", "tokens/s", "requests"):
        table.add_column(column, justify="right" if column in {"", "tokens/s", "requests"} else "left", no_wrap=True)
    for segment in recording.plan.segments:
        table.add_row(*_row(recording, segment))
    return Group(table, _now(recording))


def progress_line(recording: Recording) -> str:
    segment = recording.segment
    part = None if segment is None else recording.part(segment)
    texts = [_minutes(recording.now_s), *(_segment_text(recording, part) if part else ()), _now(recording).plain]
    return "  ".join(texts)


def sparkline(values: Sequence[float], *, low: float, high: float) -> str:
    """Return one block for each value, from the lowest at `low` to the full one at `high`."""
    steps = len(_BLOCKS) - 1
    return "".join(_BLOCKS[min(steps, max(0, round(steps * (value - low) / (high - low))))] for value in values)


def _segment_text(recording: Recording, part: Part) -> list[str]:
    length, rate = _recent(recording, part), part.tokens_per_second
    texts = [f"{part.name} ({part.domain}): {part.requests} requests"]
    texts += [] if length is None else [f"{length:.2f} tokens per step"]
    texts += [] if rate is None else [f"{rate:.0f} tokens/s"]
    return [", ".join(texts) + ";"]


def _row(recording: Recording, segment: Segment) -> tuple[str | Text, ...]:
    part = recording.part(segment.name)
    style = "bold" if recording.segment is segment.name else "dim" if part is None else ""
    name, domain = Text(segment.name, style), Text(segment.domain, style)
    if part is None:
        return name, domain, "", "", "", ""
    lengths = [length for request in _requests(recording, part) if (length := acceptance_length([request]))]
    rate = f"{part.tokens_per_second:.0f}" if part.tokens_per_second else ""
    recent = _recent(recording, part)
    spark = Text(sparkline(lengths[-_SPARK_WIDTH:], low=1.0, high=_SPARK_HIGH), "blue")
    return name, domain, spark, "" if recent is None else f"{recent:.2f}", rate, str(part.requests)


def _now(recording: Recording) -> Text:
    draft = f"draft {recording.served_version}" if recording.served_version else "no draft yet"
    swaps = f"{len(recording.swaps)} swap{'s' * (len(recording.swaps) != 1)}"
    left_s = max(0.0, recording.plan.total_s - recording.now_s)
    return Text(f"{recording.doing}; {draft}, {swaps}; {_trainer(recording)}; {_minutes(left_s)} left")


def _trainer(recording: Recording) -> str:
    steps = f"trainer at step {recording.optimizer_steps}"
    if not recording.estimates:
        return steps
    estimate = recording.estimates[-1]
    return f"{steps}, candidate {estimate.candidate_length:.2f} against {estimate.baseline_length:.2f}"


def _requests(recording: Recording, part: Part) -> list[Request]:
    return [request for request in recording.requests if request.segment is part.name]


def _recent(recording: Recording, part: Part) -> float | None:
    return acceptance_length(_requests(recording, part)[-_NUM_RECENT:])


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
