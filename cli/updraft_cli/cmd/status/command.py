"""`updraft status`."""

import asyncio
from functools import partial
from pathlib import Path

import click

from updraft_cli import output
from updraft_cli.backends.registry import Target
from updraft_cli.cmd import options
from updraft_cli.cmd.status import view
from updraft_cli.cmd.status.gather import gather
from updraft_cli.local.data_folder import DataFolder
from updraft_cli.output import Format

_INFERENCE_URL = "http://127.0.0.1:8000"


@click.command()
@click.option(
    "--inference",
    metavar="URL",
    help=f"Inference process to look at.  [default: that of `updraft up`, else {_INFERENCE_URL}]",
)
@options.output("table", "wide", "json", "yaml")
@options.connection
def status(connection: Target, inference: str | None, form: Format, data: Path) -> None:
    """What runs, which draft serves, how it does.

    Acceptance is counted since the start of the pods that now serve. "accepted" is tokens a verify step; "by
    position" is the share of the drafts proposed as the 1st, 2nd, ... of a verify step that was accepted.
    """
    state = DataFolder(data).read_state()
    url = inference or (state.inference_url if state else _INFERENCE_URL)
    found = asyncio.run(gather(state, connection, url))
    output.show(found, form, names=(), rendered=partial(view.rendered, found))
