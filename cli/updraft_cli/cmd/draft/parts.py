"""Runs the engine or the trainer as a process of its own, and shows its progress."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from updraft_chassis.errors import Unavailable
from updraft_chassis.progress import Progress
from updraft_cli.local import tether
from updraft_cli.local.child import ending

_LINE_S = 15.0


def run(part: str, arguments: Iterable[object], environment: dict[str, str]) -> None:
    """Run `python -m updraft_<part>`, and show its progress. It writes its errors to stderr itself."""
    command = [sys.executable, "-m", f"updraft_{part}", *map(str, arguments)]
    with (
        shown() as show,
        subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), *command],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # the terminal's Ctrl-C goes to us alone
        ) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                show(Progress.parse(line))
        except BaseException:
            child.kill()
            raise
    if child.returncode < 0:
        raise Unavailable(f"{part} {ending(child.returncode)}; the same command goes on from there")
    if child.returncode:
        raise SystemExit(child.returncode)


@contextmanager
def shown() -> Iterator[Callable[[Progress], None]]:
    """Progress on stderr: a bar on a terminal, and a line every few seconds in a log."""
    console = Console(stderr=True, highlight=False, markup=False)
    with _bar(console) if console.is_terminal else nullcontext(_lines(console)) as show:
        yield show


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[Progress], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:

        def show(progress: Progress) -> None:
            if progress.note:
                console.print(progress.note, soft_wrap=True)
            if not bar.tasks or bar.tasks[-1].description != progress.activity:
                for task in bar.task_ids:
                    bar.remove_task(task)
                # Parts that were done before do not count for the time that is left.
                bar.add_task(progress.activity, completed=progress.done, total=progress.total, speed="")
            current = bar.tasks[-1]
            bar.update(current.id, completed=progress.done, speed=_speed(progress, current.elapsed or 0.0))

        yield show


def _lines(console: Console) -> Callable[[Progress], None]:
    activity, started, shown_s, first = "", 0.0, 0.0, 0

    def show(progress: Progress) -> None:
        nonlocal activity, started, shown_s, first
        if progress.note:
            console.print(progress.note, soft_wrap=True)
        now = time.monotonic()
        if progress.activity != activity:
            activity, started, first = progress.activity, now, progress.done
        elif now - shown_s < _LINE_S:
            return
        shown_s = now
        done = f"{progress.done} of {progress.total}"
        parts = (done, _speed(progress, now - started), _left(progress, first, now - started))
        console.print(f"{activity}: {', '.join(filter(None, parts))}", soft_wrap=True)

    return show


def _speed(progress: Progress, seconds: float) -> str:
    return f"{progress.tokens / seconds:,.0f} tokens/s" if progress.tokens and seconds else ""


def _left(progress: Progress, first: int, seconds: float) -> str:
    """The time that is left, if the parts from `first` on took `seconds`."""
    num_done = progress.done - first
    if num_done <= 0:
        return ""
    return f"{timedelta(seconds=round((progress.total - progress.done) * seconds / num_done))} left"
