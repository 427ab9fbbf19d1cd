"""`draft list | show | diff | history`, which look at versions through either backend."""

from datetime import UTC, datetime
from functools import partial

import click

from updraft_cli import output
from updraft_cli.backends.differences import difference
from updraft_cli.backends.drafts import Draft, HistoryEntry
from updraft_cli.backends.protocol import Backend, Version
from updraft_cli.cmd import arguments, options
from updraft_cli.cmd.arguments import VERSION
from updraft_cli.cmd.draft import differences_view, view
from updraft_cli.cmd.program import Command
from updraft_cli.output import Format


@click.command("list", cls=Command, needs=("listing", "connection"))
@arguments.speculator
@options.output()
def list_(backend: Backend, form: Format) -> None:
    """List all versions, newest first.

    "accepted" is tokens per verify step in live traffic, counted by the pods that are connected now.
    """
    drafts = backend.drafts()
    names = map(_name, drafts.drafts)
    output.show(drafts, form, names=names, rendered=partial(view.rendered_list, drafts, datetime.now(UTC)))


@click.command(cls=Command, needs=("connection",))
@arguments.version()
@options.output()
def show(backend: Backend, version: Version, form: Format) -> None:
    """Show one version: origin, evaluation, history, tensors."""
    details = backend.draft(version)
    rendered = partial(view.rendered_details, details, datetime.now(UTC))
    output.show(details, form, names=[_name(details.draft)], rendered=rendered)


@click.command(cls=Command, needs=("connection",))
@arguments.version(is_required=False)
@click.option(
    "--limit",
    type=click.IntRange(1, 1000),
    help="Show the last N entries.  [default: 50 of a registry, all of a cluster]",
)
@options.output()
def history(backend: Backend, version: Version | None, limit: int | None, form: Format) -> None:
    """Show the changes of all versions or of one, and their reasons; oldest first.

    In a cluster, DraftVersions keep their last 20 changes of phase, and wide adds the Events that the API server still has.
    A single word is a version if it is a number or a role, else a name.
    """
    changes = backend.history(version, limit=limit, has_kubernetes_events=form in {"wide", "json", "yaml"})
    names = dict.fromkeys(_name(entry) for entry in changes.events if entry.version)
    output.show(changes, form, names=names, rendered=partial(view.rendered_history, changes))


@click.command(cls=Command, needs=("connection",))
@click.argument("old", metavar="VERSION", type=VERSION)
@click.argument("new", metavar="VERSION", type=VERSION)
@options.output()
def diff(backend: Backend, old: Version, new: Version, form: Format) -> None:
    """Compare two versions: manifest, origin, evaluation, traffic, tensors.

    For example `draft diff stable candidate`. wide, json and yaml include what is equal; name prints the names of
    the differences.
    """
    comparison = difference(backend.draft(old), backend.draft(new))
    fields = [field.name for field in comparison.fields if not field.is_equal]
    tensors = [pair.name for pair in comparison.tensors if not pair.is_equal]
    output.show(comparison, form, names=[*fields, *tensors], rendered=partial(differences_view.rendered, comparison))


def _name(draft: Draft | HistoryEntry) -> object:
    return output.resource("draftversion", draft.object) if draft.object else draft.version
