"""Decisions of a person: `draft pin | unpin | promote` and `rollout pause | resume`. Each prints the result."""

from functools import partial

import click
from rich.text import Text

from updraft_cli import output
from updraft_cli.backends.protocol import Backend, Verb, Version
from updraft_cli.cmd import arguments, options
from updraft_cli.cmd.program import Command
from updraft_cli.output import Format

_command = partial(click.command, cls=Command, needs=("decision", "connection"))


@_command()
@arguments.version(least=0)
@options.output()
def pin(backend: Backend, version: Version, form: Format) -> None:
    """Serve exactly this version, or no draft (0), now and without analysis.

    VERSION is a number, or a role: stable, candidate, previous, latest. Newer versions are held until `draft unpin`.
    No pod restarts.
    """
    _decide(backend, Verb.PIN, version, form)


@_command()
@arguments.speculator
@options.output()
def unpin(backend: Backend, form: Format) -> None:
    """End a pin: the last promoted version serves, and newer versions are tried again."""
    _decide(backend, Verb.UNPIN, None, form)


@_command()
@arguments.version()
@options.output()
def promote(backend: Backend, version: Version, form: Format) -> None:
    """Make a waiting version or a canary stable now, without further analysis.

    Unlike a pin, it holds nothing back: later versions are tried as usual.
    """
    _decide(backend, Verb.PROMOTE, version, form)


@_command()
@arguments.speculator
@options.output()
def pause(backend: Backend, form: Format) -> None:
    """Freeze: a canary keeps its pods, and no new version is tried. A canary that fails is still rolled back."""
    _decide(backend, Verb.PAUSE, None, form)


@_command()
@arguments.speculator
@options.output()
def resume(backend: Backend, form: Format) -> None:
    """Continue a paused rollout."""
    _decide(backend, Verb.RESUME, None, form)


def warn(warning: str) -> None:
    if warning:
        click.echo(f"Note: {warning}", err=True)


def _decide(backend: Backend, verb: Verb, version: Version | None, form: Format) -> None:
    decision = backend.decide(verb, version)
    warn(decision.warning)
    names = [output.speculator_name(decision.name, decision.namespace)]
    output.show(decision, form, names=names, rendered=lambda *, is_wide: Text(decision.message))
