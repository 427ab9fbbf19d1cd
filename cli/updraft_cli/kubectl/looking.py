"""`kubectl updraft status | versions | history | explain`."""

import sys
from datetime import UTC, datetime
from functools import partial
from typing import NoReturn

import click

from updraft_chassis.errors import Forbidden, NotFound
from updraft_cli import output
from updraft_cli.backends import objects
from updraft_cli.backends.cluster import Cluster, Place, connected
from updraft_cli.backends.objects import DRAFT_VERSIONS, GROUP, SPECULATORS, Event, Json, Speculator, Version
from updraft_cli.cmd.explain.explanation import explain as explained
from updraft_cli.cmd.options import Command
from updraft_cli.kubectl import listings, pictures
from updraft_cli.kubectl.decisions import numbered
from updraft_cli.kubectl.listings import Past
from updraft_cli.kubectl.options import chosen, complete_name, complete_words, everywhere, form, name_or_version, place
from updraft_cli.kubectl.watching import Lines, Screen, watch
from updraft_cli.output import Format

_INTERRUPTED = 130
"""What a shell says of a process that SIGINT ended."""


@click.command(cls=Command)
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("-w", "--watch", "is_watched", is_flag=True, help="Go on, and show every change, until Ctrl-C.")
@form
@everywhere
@place
def status(place: Place, name: str | None, form: Format, is_watched: bool) -> None:  # noqa: FBT001 - a flag
    """How a speculator is, what it serves and what it tries; without NAME, all of the namespace.

    wide has every condition. With --watch a terminal shows the whole again and again; into a pipe goes one line a
    change (-o json: one object a line).
    """
    with connected(place) as cluster:
        if is_watched:
            _watch(cluster, name or "", form)
        listing = listings.speculators(cluster.namespace, _owners(cluster, name or ""))
    names = [_reference(SPECULATORS, speculator.name) for speculator in listing.speculators]
    output.show(listing, form, names=names, rendered=partial(pictures.rendered_speculators, listing, _now()))


@click.command(cls=Command)
@click.argument("name", required=False, shell_complete=complete_name)
@form
@everywhere
@place
def versions(place: Place, name: str | None, form: Format) -> None:
    """The draft versions, newest first; without NAME, those of all speculators of the namespace.

    "accepted" is tokens a verify step on live traffic, "loaded" how many pods hold it of those that should.
    """
    with connected(place) as cluster:
        owners = _owners(cluster, name or "")
        if len(owners) == 1 and cluster.namespace:
            name = owners[0]["metadata"]["name"]
        listing = listings.versions(cluster.namespace, owners, cluster.versions(name or ""), speculator=name or "")
    names = [_reference(DRAFT_VERSIONS, version.name) for version in listing.versions]
    output.show(listing, form, names=names, rendered=partial(pictures.rendered_versions, listing, _now()))


@click.command(cls=Command)
@click.argument("words", nargs=-1, metavar="[NAME] [VERSION]", shell_complete=complete_words)
@form
@place
def history(place: Place, words: tuple[str, ...], form: Format) -> None:
    """What happened to all versions of a speculator or to one, and why; oldest first.

    The DraftVersions keep their last changes of phase; wide adds the Events that the API server still has.
    """
    name, said = name_or_version(words)
    with connected(place) as cluster:
        owner = objects.speculator(chosen(cluster, name))
        found = tuple(map(objects.version, cluster.versions(owner.name)))
        only = None if said is None else _numbered(owner, found, said)
        past = _past(cluster, owner, found, only, has_events=form in {"wide", "json", "yaml"})
    kept = found if only is None else (only,)
    names = [_reference(DRAFT_VERSIONS, version.name) for version in kept]
    output.show(past, form, names=names, rendered=partial(pictures.rendered_past, past))


@click.command(cls=Command)
@click.argument("name", required=False, shell_complete=complete_name)
@form
@place
def explain(place: Place, name: str | None, form: Format) -> None:
    """What a speculator does now, what is amiss and what to do, what its rollout waits for, what would restart pods."""
    with connected(place) as cluster:
        found = objects.speculator(chosen(cluster, name))
        explanation = explained(found, map(objects.version, cluster.versions(found.name)), _now())
    rendered = partial(pictures.rendered_explanation, explanation, _now())
    output.show(explanation, form, names=[_reference(SPECULATORS, found.name)], rendered=rendered)


LOOKS = (status, versions, history, explain)


def _watch(cluster: Cluster, name: str, form: Format) -> NoReturn:
    if form in {"yaml", "name"}:
        raise click.UsageError("--watch goes with -o table, wide or json")
    try:
        if form == "json" or not sys.stdout.isatty():
            watch(cluster, name, Lines(output.console(), _now, is_json=form == "json"))
        with Screen(output.console(), _now, is_wide=form == "wide") as screen:
            watch(cluster, name, screen)
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None
    raise AssertionError("a watch has no end of its own")


def _numbered(owner: Speculator, found: tuple[Version, ...], said: int | str) -> Version:
    number = numbered(owner, said)
    for version in found:
        if version.number == number:
            return version
    raise NotFound(f"{owner.name} has no DraftVersion with the number {number}")


def _past(
    cluster: Cluster, owner: Speculator, found: tuple[Version, ...], only: Version | None, *, has_events: bool
) -> Past:
    """Events are for who may read them; the rest does not hang on it."""
    events: tuple[Event, ...] = ()
    complaint = ""
    if has_events:
        try:
            events = listings.about(cluster.events(), owner.name, only)
        except Forbidden as error:
            complaint = str(error)
    return Past(
        namespace=owner.namespace,
        speculator=owner.name,
        changes=listings.changes(found if only is None else (only,)),
        events=events,
        complaint=complaint,
    )


def _owners(cluster: Cluster, name: str) -> tuple[Json, ...]:
    """The AdaptiveSpeculators of the place; with a name, those of that name, and NotFound if there is none."""
    if name and cluster.namespace:
        return (cluster.speculator(name),)
    found = cluster.speculators(name).items
    if name and not found:
        raise NotFound(f"no namespace has an AdaptiveSpeculator {name}")
    return found


def _reference(plural: str, name: str) -> str:
    """As kubectl writes names, so that they can be given back to it."""
    return f"{plural.removesuffix('s')}.{GROUP}/{name}"


def _now() -> datetime:
    return datetime.now(UTC)
