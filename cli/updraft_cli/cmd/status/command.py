"""`status`."""

from datetime import UTC, datetime
from functools import partial

import click

from updraft_cli import output
from updraft_cli.backends.protocol import Backend
from updraft_cli.cmd import arguments, options
from updraft_cli.cmd.follow import View, follow
from updraft_cli.cmd.program import Command
from updraft_cli.cmd.status import view
from updraft_cli.output import Format


@click.command(cls=Command, needs=("status", "listing", "connection"))
@arguments.speculator
@click.option("-w", "--watch", "is_watched", is_flag=True, help="Show every change, until Ctrl-C.")
@options.output()
def status(backend: Backend, form: Format, is_watched: bool) -> None:  # noqa: FBT001 - a flag
    """Show what runs, which draft serves, and how well.

    Without NAME, all speculators. Acceptance is counted since the start of the pods that serve now: "accepted" is tokens
    per verify step; "by position" is the share of the draft tokens proposed as the 1st, 2nd, ... of a verify step that was
    accepted. wide adds process ids and logs, and in a cluster every condition. With --watch, a terminal is redrawn in
    place, and in a pipe each change is one line (-o json: one object per line).
    """
    if is_watched:
        shown = View(items=view.items, rendered=view.rendered)
        follow(backend.watch_installation(), shown, form, is_last=lambda _: False)
    installation = backend.installation()
    names = [
        output.speculator_name(speculator.name, speculator.namespace) for speculator in installation.speculators or ()
    ]
    output.show(installation, form, names=names, rendered=partial(view.rendered, installation, datetime.now(UTC)))
