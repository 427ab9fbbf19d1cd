"""`draft train`: a first draft before any traffic, from requests that the target makes up.

The engine and the trainer do the work as processes of their own, because the command line has no torch. Both may be killed at
any time: what they keep appears by a rename.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import click
from google.protobuf import json_format
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import Conflict, InvalidInput, Unavailable
from updraft_chassis.progress import Progress
from updraft_cli.backends.wire import draft_details
from updraft_cli.cmd.draft import view
from updraft_cli.local import tether
from updraft_cli.local.child import ending

MIN_REQUESTS, MAX_REQUESTS = 24, 1000
"""The trainer needs 16 different texts, and some requests may be alike or cut off. More than 1,000 hardly help, and all of them
have to fit into its memory."""

_LINE_S = 15.0
_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


@click.command()
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--self-play",
    "count",
    metavar="N",
    type=click.IntRange(MIN_REQUESTS, MAX_REQUESTS),
    required=True,
    help="Number of requests that the model writes and answers.",
)
@click.option(
    "--output",
    "folder",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="A new folder for the draft.",
)
@click.option(
    "--recordings",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the recorded requests; those that it holds are not made again.  [default: FOLDER-recordings]",
)
@click.option("--threads", type=click.IntRange(1), help="Threads to use.  [default: chosen by torch]")
def train(model: Path, count: int, folder: Path, recordings: Path | None, threads: int | None) -> None:
    """Train a first draft before any traffic.

    MODEL, a folder in Hugging Face layout with a chat template, writes N requests and answers them. The draft learns from
    seven of eight, and the others judge it. Ctrl-C stops it; the same command goes on with what is recorded.

    \b
    updraft draft train MODEL --self-play 400 --output day0
    updraft draft import day0
    """
    folder = folder.absolute()
    recordings = (recordings or folder.with_name(f"{folder.name}-recordings")).absolute()
    _check_empty(folder)
    for place in (folder.parent, recordings):
        _check_writable(place)
    environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    arguments = ("--model", str(model), "--recordings", str(recordings), "--requests", str(count))
    try:
        _run("inference", arguments, environment)
        _run("trainer", (*arguments, "--output", str(folder)), environment)
    except KeyboardInterrupt:
        click.echo(f"Stopped. Recorded requests stay in {recordings}; the same command goes on from there.", err=True)
        raise SystemExit(_INTERRUPTED) from None
    click.echo(_summary(folder))


def _check_empty(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise Conflict(f"{folder} is not empty: name a new folder with --output")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidInput(f"cannot write to {folder}: {error.strerror or error}") from error


def _run(part: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    """Run `python -m updraft_<part> self-play`, and show its progress. It writes its errors to stderr itself."""
    command = [sys.executable, "-m", f"updraft_{part}", "self-play", *arguments]
    with (
        _shown() as show,
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
        raise Unavailable(f"{part} {ending(child.returncode)}; the same command goes on with what is recorded")
    if child.returncode:
        raise SystemExit(child.returncode)


@contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """Progress on stderr: a bar on a terminal, and a line every few seconds in a log."""
    console = Console(stderr=True, highlight=False)
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
            if not bar.tasks or bar.tasks[-1].description != progress.activity:
                for task in bar.task_ids:
                    bar.remove_task(task)
                # Parts that were done before do not count for the time that is left.
                bar.add_task(progress.activity, completed=progress.done, total=progress.total, speed="")
            current = bar.tasks[-1]
            bar.update(current.id, completed=progress.done, speed=_speed(progress, current.elapsed or 0.0))

        yield show


def _lines(console: Console) -> Callable[[Progress], None]:
    activity, started, shown = "", 0.0, 0.0

    def show(progress: Progress) -> None:
        nonlocal activity, started, shown
        now = time.monotonic()
        if progress.activity != activity:
            activity, started = progress.activity, now
        elif now - shown < _LINE_S:
            return
        shown = now
        parts = (f"{progress.done} of {progress.total}", _speed(progress, now - started))
        console.print(f"{activity}: {', '.join(filter(None, parts))}", soft_wrap=True)

    return show


def _speed(progress: Progress, seconds: float) -> str:
    return f"{progress.tokens / seconds:.0f} tokens/s" if progress.tokens and seconds else ""


def _summary(folder: Path) -> str:
    from updraft_artifacts.transfer import MANIFEST  # noqa: PLC0415 - needs numpy, as in registry_commands

    manifest = json_format.Parse((folder / MANIFEST).read_text(), pb.Manifest())
    details = draft_details(pb.Version(manifest=manifest))
    return (
        f"{folder} holds a draft: {view.offline(details.evaluation)}.\nPublish it with: updraft draft import {folder}"
    )
