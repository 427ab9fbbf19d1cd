"""`updraft status`."""

import asyncio
from pathlib import Path

import click

from updraft_cli import output
from updraft_cli.commands import options
from updraft_cli.status import gather
from updraft_cli.up.data_folder import DataFolder
from updraft_cli.views import status as view

_INFERENCE_URL = "http://127.0.0.1:8000"


@click.command()
@options.registry
@click.option(
    "--inference",
    metavar="URL",
    help=f"Inference process to look at.  [default: that of `updraft up`, else {_INFERENCE_URL}]",
)
@options.data
@options.output
def status(registry: str | None, inference: str | None, data: Path, output: output.Format) -> None:
    """What runs, which draft serves, how it does.

    Acceptance is counted since the start of the pods that now serve. "accepted" is tokens a verify step; "by
    position" is the share of verify steps that accepted their 1st, 2nd, ... draft.
    """
    state = DataFolder(data).read_state()
    address = options.registry_address(registry, data)
    url = inference or (state.inference_url if state else _INFERENCE_URL)
    view.show(asyncio.run(gather(state, address, url)), output)
