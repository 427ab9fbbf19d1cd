"""`kubectl updraft explain`."""

from datetime import UTC, datetime
from functools import partial

import click

from updraft_cli import output
from updraft_cli.backends.cluster import ClusterBackend
from updraft_cli.cmd import arguments, options
from updraft_cli.cmd.explain import view
from updraft_cli.cmd.explain.explanation import explain as explained
from updraft_cli.cmd.program import Command
from updraft_cli.output import Format


@click.command(cls=Command, needs=("connection",))
@arguments.speculator
@options.output()
def explain(backend: ClusterBackend, form: Format) -> None:
    """Explain a speculator: what it does now, each problem and its fix, the rollout, and which fields restart pods."""
    now = datetime.now(UTC)
    explanation = explained(*backend.speculator_with_drafts(), now)
    names = [output.resource("adaptivespeculator", explanation.name)]
    output.show(explanation, form, names=names, rendered=partial(view.rendered, explanation, now))
