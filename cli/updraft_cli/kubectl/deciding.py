"""`kubectl updraft pin | unpin | pause | resume | promote`: a person decides, by a field of the resource.

Each sets one field of spec.rollout by a merge patch, tells what follows, and does nothing where it is so already.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
from rich.text import Text

from updraft_cli import output
from updraft_cli.backends import objects
from updraft_cli.backends.cluster import MANAGER, Cluster, Place, connected
from updraft_cli.backends.objects import GROUP, SPECULATORS, Json, Speculator, Version, writers
from updraft_cli.cmd.options import Command
from updraft_cli.kubectl import decisions
from updraft_cli.kubectl.decisions import Decision, numbered
from updraft_cli.kubectl.options import (
    chosen,
    complete_name,
    complete_words,
    dry_run,
    form,
    name_and_version,
    place,
)
from updraft_cli.output import Format

_BY_HAND = (MANAGER, "kubectl-patch", "kubectl-edit")
"""Field managers behind which there is no file that would be applied again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What became of a decision."""

    namespace: str
    name: str
    field: str
    value: Any
    """None: taken out of the spec."""
    changed: bool
    dry_run: bool
    message: str


@click.command(cls=Command)
@click.argument("words", nargs=-1, metavar="[NAME] VERSION", shell_complete=complete_words)
@dry_run
@form
@place
def pin(place: Place, words: tuple[str, ...], form: Format, dry_run: str) -> None:
    """Serve exactly this version, or none (0), now and without analysis.

    VERSION is a number, or what a version is now: stable, candidate, previous, latest. Newer ones are held until
    `kubectl updraft unpin`. No pod restarts.
    """
    name, said = name_and_version(words, least=0)
    _decide(place, name, form, dry_run, lambda found, versions: decisions.pin(found, versions, numbered(found, said)))


@click.command(cls=Command)
@click.argument("name", required=False, shell_complete=complete_name)
@dry_run
@form
@place
def unpin(place: Place, name: str | None, form: Format, dry_run: str) -> None:
    """Let the registry choose again: the version that won last serves, and newer ones are tried."""
    _decide(place, name, form, dry_run, lambda found, _: decisions.unpin(found))


@click.command(cls=Command)
@click.argument("name", required=False, shell_complete=complete_name)
@dry_run
@form
@place
def pause(place: Place, name: str | None, form: Format, dry_run: str) -> None:
    """Freeze: a canary stays where it is, and no new version is tried. A canary that fails is still rolled back."""
    _decide(place, name, form, dry_run, lambda found, _: decisions.pause(found))


@click.command(cls=Command)
@click.argument("name", required=False, shell_complete=complete_name)
@dry_run
@form
@place
def resume(place: Place, name: str | None, form: Format, dry_run: str) -> None:
    """Go on where it was paused."""
    _decide(place, name, form, dry_run, lambda found, _: decisions.resume(found))


@click.command(cls=Command)
@click.argument("words", nargs=-1, metavar="[NAME] VERSION", shell_complete=complete_words)
@dry_run
@form
@place
def promote(place: Place, words: tuple[str, ...], form: Format, dry_run: str) -> None:
    """Make a waiting or tried version stable now, without further analysis.

    Unlike a pin it holds nothing: later versions are tried as usual.
    """
    name, said = name_and_version(words, least=1)
    _decide(
        place, name, form, dry_run, lambda found, versions: decisions.promote(found, versions, numbered(found, said))
    )


DECISIONS = (pin, unpin, pause, resume, promote)


def _decide(
    place: Place,
    name: str | None,
    form: Format,
    dry_run: str,
    judge: Callable[[Speculator, tuple[Version, ...]], Decision],
) -> None:
    is_dry_run = dry_run == "server"
    with connected(place) as cluster:
        content = chosen(cluster, name)
        found = objects.speculator(content)
        decision = judge(found, tuple(map(objects.version, cluster.versions(found.name))))
        if decision.is_change:
            _apply(cluster, content, decision, is_dry_run=is_dry_run)
    prefix = "Nothing is kept of this dry run: " if is_dry_run and decision.is_change else ""
    decided = Decided(
        namespace=found.namespace,
        name=found.name,
        field=f"spec.rollout.{decision.field}",
        value=decision.value,
        changed=decision.is_change and not is_dry_run,
        dry_run=is_dry_run,
        message=f"{prefix}{decision.told}",
    )
    reference = f"{SPECULATORS.removesuffix('s')}.{GROUP}/{found.name}"
    output.show(decided, form, names=[reference], rendered=lambda *, is_wide: Text(decided.message))


def _apply(cluster: Cluster, content: Json, decision: Decision, *, is_dry_run: bool) -> None:
    cluster.patch(content["metadata"]["name"], {decision.field: decision.value}, is_dry_run=is_dry_run)
    if others := [writer for writer in writers(content, decision.field) if writer not in _BY_HAND]:
        click.echo(
            f"Note: {' and '.join(others)} set spec.rollout.{decision.field} before, and may set it back: change it"
            " there too.",
            err=True,
        )
