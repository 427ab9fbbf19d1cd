"""How a download goes on, on stderr: a bar on a terminal, and now and then a line in a log.

What has arrived is read off the disk, for libraries that download tell it in ways of their own, or not at all.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from updraft_cli.models.pulling import Told
from updraft_cli.output import size

_BAR_S = 0.5
_LINE_S = 15.0


@contextmanager
def shown(what: str, folder: Path) -> Iterator[Told]:
    """Show the progress of a download into a folder, and its growth in between."""
    console = Console(stderr=True, highlight=False)
    with _bar(what, console) if console.is_terminal else _lines(what, console) as (told, look_s):
        ended = threading.Event()
        expected = 0

        def note(step: str, done: int, total: int) -> None:
            nonlocal expected
            expected = total
            told(step, done, total)

        def watch() -> None:
            while not ended.wait(look_s):
                if expected:
                    told("", min(_bytes(folder), expected), expected)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield note
        finally:
            ended.set()
            watcher.join()


@contextmanager
def _bar(what: str, console: Console) -> Iterator[tuple[Told, float]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def told(_step: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total or None)

        yield told, _BAR_S


@contextmanager
def _lines(what: str, console: Console) -> Iterator[tuple[Told, float]]:
    def told(step: str, done: int, total: int) -> None:
        arrived = f"{size(done)} of {size(total)}" if total else ""
        console.print(f"{what}: {', '.join(filter(None, (step, arrived)))}", soft_wrap=True)

    yield told, _LINE_S


def _bytes(folder: Path) -> int:
    """Count all files in it; one that is renamed meanwhile may be missed or counted twice."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
