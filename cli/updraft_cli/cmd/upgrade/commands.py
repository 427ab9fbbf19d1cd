"""`kubectl updraft upgrade plan | start | skip`."""

from functools import partial

import click

from updraft_chassis.errors import Conflict
from updraft_cli import output
from updraft_cli.backends.cluster import ClusterBackend
from updraft_cli.backends.objects import GROUP
from updraft_cli.cmd import arguments, options
from updraft_cli.cmd.program import Group
from updraft_cli.cmd.upgrade.plan import ResourceUpgrade, plan_of, rendered
from updraft_cli.output import Format

START, SKIP = f"{GROUP}/upgrade", f"{GROUP}/skip-upgrade"
"""Annotations with the runtime that is meant, so that a request is none for another one."""


@click.group(cls=Group)
def upgrade() -> None:
    """Upgrades of the operator: which pods still have to restart for it, and when.

    A newer operator restarts the pods of one resource after the other, by each resource's spec.updatePolicy, and stops at the
    first one that does not come back.
    """


@upgrade.command(needs=("status", "listing", "connection"))
@arguments.speculator
@options.output()
def plan(backend: ClusterBackend, form: Format) -> None:
    """Show what would restart, why and when. Nothing is changed."""
    found = plan_of(backend.contents())
    names = [output.speculator_name(one.speculator, one.namespace) for one in found.resources]
    output.show(found, form, names=names, rendered=partial(rendered, found))


@upgrade.command(needs=("decision", "connection"))
@arguments.speculator
def start(backend: ClusterBackend) -> None:
    """Update the pods of a resource now, whatever its spec.updatePolicy says, when no other one is being updated."""
    one = _ask(backend, START)
    name = f"{one.namespace}/{one.speculator}"
    click.echo(f"{_prefix(backend)}{name} gets runtime {one.available} when it is its turn. Until now: {one.message}")


@upgrade.command(needs=("decision", "connection"))
@arguments.speculator
def skip(backend: ClusterBackend) -> None:
    """Let the other resources go on although this one does not come back from its update."""
    one = _ask(backend, SKIP, only_for=("Updating", "UpdateFailed"))
    click.echo(f"{_prefix(backend)}{one.namespace}/{one.speculator} does not stop updates to {one.available} any more.")


def _ask(backend: ClusterBackend, annotation: str, only_for: tuple[str, ...] = ()) -> ResourceUpgrade:
    (one,) = plan_of([backend.content()]).resources
    if one.is_current:
        raise Conflict(f"{one.namespace}/{one.speculator} is up to date with runtime {one.current}")
    if not one.available:
        raise Conflict(f"the operator has not said yet which runtime it has for {one.namespace}/{one.speculator}")
    if only_for and one.reason not in only_for:
        raise Conflict(f"{one.namespace}/{one.speculator} is not being updated, so it stops no other: {one.message}")
    backend.annotate({annotation: one.available})
    return one


def _prefix(backend: ClusterBackend) -> str:
    return "Dry run, nothing was kept: " if backend.is_dry_run else ""
