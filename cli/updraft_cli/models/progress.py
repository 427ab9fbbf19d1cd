"""Progress of a download on stderr: a bar on a terminal, and a line every few seconds in a log.

Progress is read from the disk, because each download library reports it in its own way, or not at all.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from updraft_cli.models.pulling import Report
from updraft_cli.output import size

_BAR_S = 0.5
_LINE_S = 15.0


@contextmanager
def shown(what: str, folder: Path) -> Iterator[Report]:
    """Show the progress of a download into a folder, and its growth in between."""
    console = Console(stderr=True, highlight=False)
    with _bar(what, console) if console.is_terminal else _lines(what, console) as (report, look_s):
        ended = threading.Event()
        expected = 0

        def note(step: str, done: int, total: int) -> None:
            nonlocal expected
            expected = total
            report(step, done, total)

        def watch() -> None:
            while not ended.wait(look_s):
                if expected:
                    report("", min(_bytes(folder), expected), expected)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield note
        finally:
            ended.set()
            watcher.join()


@contextmanager
def _bar(what: str, console: Console) -> Iterator[tuple[Report, float]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def report(_step: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total or None)

        yield report, _BAR_S


@contextmanager
def _lines(what: str, console: Console) -> Iterator[tuple[Report, float]]:
    def report(step: str, done: int, total: int) -> None:
        arrived = f"{size(done)} of {size(total)}" if total else ""
        console.print(f"{what}: {', '.join(filter(None, (step, arrived)))}", soft_wrap=True)

    yield report, _LINE_S


def _bytes(folder: Path) -> int:
    """Count all files in it; one that is renamed meanwhile may be missed or counted twice."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
