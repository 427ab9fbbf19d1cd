"""Options that the plugin's commands share: where in which cluster, and whom it is about."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
from click.shell_completion import CompletionItem

from updraft_chassis.errors import InvalidInput, NotFound, UpdraftError
from updraft_cli.backends.cluster import Cluster, Place, connected, contexts
from updraft_cli.backends.objects import ROLES, Json, newest_first, version
from updraft_cli.cmd.options import Decorated, Decorator
from updraft_cli.cmd.versions import VERSION, VERSION_OR_NONE
from updraft_cli.output import Format


def place(command: Decorated) -> Decorated:
    """Add the options of a place in a cluster; the command gets them as `place`."""

    @_namespace
    @_context
    @_kubeconfig
    @functools.wraps(command)
    def wrapped(namespace: str | None, context: str | None, kubeconfig: Path | None, **rest: Any) -> Any:
        is_everywhere = rest.pop("all_namespaces", False)
        found = Place(kubeconfig=kubeconfig, context=context, namespace=namespace, is_everywhere=is_everywhere)
        return command(place=found, **rest)

    return wrapped


everywhere: Decorator = click.option("-A", "--all-namespaces", is_flag=True, help="In all namespaces.")
"""Above `place`, whose `Place` it changes."""

form: Decorator = click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(get_args(Format)),
    default="table",
    show_default=True,
    help="table and wide for a person, json and yaml for a program, name as kubectl writes and takes it.",
)

dry_run: Decorator = click.option(
    "--dry-run",
    type=click.Choice(["none", "server"]),
    default="none",
    show_default=True,
    help="server: let the API server check and admit the change, and keep nothing of it.",
)


def chosen(cluster: Cluster, name: str | None) -> Json:
    """Return the AdaptiveSpeculator of that name; without one, the only one of the namespace."""
    if name is not None:
        return cluster.speculator(name)
    found = cluster.speculators().items
    if not found:
        raise NotFound(f"namespace {cluster.namespace} has no AdaptiveSpeculator")
    if len(found) > 1:
        names = ", ".join(item["metadata"]["name"] for item in found)
        raise InvalidInput(f"namespace {cluster.namespace} has more than one AdaptiveSpeculator, name one: {names}")
    return found[0]


def name_and_version(words: tuple[str, ...], *, least: int) -> tuple[str | None, int | str]:
    """Read `[NAME] VERSION`."""
    if not words:
        raise click.UsageError("Missing argument 'VERSION'.")
    *names, said = words
    if len(names) > 1:
        raise click.UsageError(f"Got unexpected extra argument ({said})")
    kind = VERSION if least else VERSION_OR_NONE
    return (names[0] if names else None), kind.convert(said, None, None)


def name_or_version(words: tuple[str, ...]) -> tuple[str | None, int | str | None]:
    """Read `[NAME] [VERSION]`; one word of digits is a version."""
    if len(words) == 1 and not words[0].isdecimal():
        return words[0], None
    return name_and_version(words, least=1) if words else (None, None)


def complete_name(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the speculators of the place that was typed so far; nothing when it cannot be asked."""
    names = (str(item["metadata"]["name"]) for item in _asked(ctx, lambda cluster: cluster.speculators().items))
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_words(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer names, and versions of the name typed before, or of the only one."""
    words = ctx.params.get(parameter.name or "") or ()
    name = words[0] if words else ""
    found = newest_first(version(item) for item in _asked(ctx, lambda cluster: cluster.versions(name)))
    numbers = [CompletionItem(str(v.number), help=v.phase) for v in found if v.number is not None]
    roles = [CompletionItem(role) for role in ROLES]
    offered = [item for item in (*numbers, *roles) if str(item.value).startswith(incomplete)]
    return offered if words else [*complete_name(ctx, parameter, incomplete), *offered]


def _complete_context(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    known = contexts(ctx.params.get("kubeconfig"))
    return [CompletionItem(name) for name in known if name.startswith(incomplete)]


def _asked(ctx: click.Context, ask: Callable[[Cluster], tuple[Json, ...]]) -> tuple[Json, ...]:
    given = ctx.params
    found = Place(kubeconfig=given.get("kubeconfig"), context=given.get("context"), namespace=given.get("namespace"))
    try:
        with connected(found) as cluster:
            return ask(cluster)
    except UpdraftError:
        return ()


_namespace: Decorator = click.option(
    "-n", "--namespace", metavar="NAME", help="The namespace.  [default: that of the kubeconfig's context]"
)
_context: Decorator = click.option(
    "--context",
    metavar="NAME",
    shell_complete=_complete_context,
    help="The kubeconfig's context.  [default: its current one]",
)
_kubeconfig: Decorator = click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The kubeconfig.  [default: as kubectl finds it]",
)
