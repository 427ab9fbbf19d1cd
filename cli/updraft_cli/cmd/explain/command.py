"""`kubectl updraft explain`."""

from datetime import UTC, datetime
from functools import partial

import click

from updraft_cli import output
from updraft_cli.backends.cluster import ClusterBackend
from updraft_cli.cmd import arguments, options
from updraft_cli.cmd.program import Command
from updraft_cli.output import Format


@click.command(cls=Command, needs=("connection",))
@arguments.speculator
@options.output()
def explain(backend: ClusterBackend, form: Format) -> None:
    """Explain a speculator: what it does now, each problem and its fix, the rollout, and which fields restart pods."""
    # They read a table of texts, which no other command should wait for.
    from updraft_cli.cmd.explain import explanation, view  # noqa: PLC0415

    now = datetime.now(UTC)
    explained = explanation.explain(*backend.speculator_with_drafts(), now)
    names = [output.resource("adaptivespeculator", explained.name)]
    output.show(explained, form, names=names, rendered=partial(view.rendered, explained, now))
