"""Options that several commands share, and their place in the help: how to reach a registry stands at its end."""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from updraft_chassis.credentials import Credentials
from updraft_cli.backends.registry import DEFAULT_ADDRESS, Target
from updraft_cli.local.data_folder import DataFolder
from updraft_cli.local.folders import data_folder
from updraft_cli.output import Format

Decorated = Callable[..., Any]
Decorator = Callable[[Decorated], Decorated]


class Command(click.Command):
    """A command whose help keeps the options that many commands have apart from its own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        own: list[tuple[str, str]] = []
        shared: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                (shared if parameter.name in CONNECTION else own).append(record)
        for title, records in (("Options", own), ("Registry", shared)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


def target(command: Decorated) -> Decorated:
    """Add the options of a registry and of a speculator in it; the command gets a `Target` as `target`."""

    @_speculator
    @connection
    @functools.wraps(command)
    def wrapped(connection: Target, speculator: str, data: Path, **rest: Any) -> Any:
        return command(target=replace(connection, speculator=speculator), **rest)

    return wrapped


def connection(command: Decorated) -> Decorated:
    """Add the options of a registry; the command gets a `Target` for it as `connection`, and `data`."""

    @_registry
    @_credentials
    @data
    @functools.wraps(command)
    def wrapped(registry: str | None, data: Path, **rest: Any) -> Any:
        files = {name: rest.pop(name) for name in _FILES}
        found = Target(registry=registry_address(registry, data), credentials=Credentials(**files))
        return command(connection=found, data=data, **rest)

    return wrapped


def registry_address(given: str | None, data: Path) -> str:
    """Return the registry's address: as given, else that of the stack on `data`, else the default."""
    if given:
        return given
    running = DataFolder(data).read_state()
    return running.registry_address if running else DEFAULT_ADDRESS


def output(*forms: Format) -> Decorator:
    """Add -o with these forms, or with all; the command gets one as `form`."""
    return click.option(
        "-o",
        "--output",
        "form",
        type=click.Choice(forms or get_args(Format)),
        default="table",
        show_default=True,
        help="table and wide for a person, json and yaml for a program, name for the version alone."
        if not forms
        else "For a person or for a program.",
    )


reason: Decorator = click.option("--reason", metavar="TEXT", default="", help="For the history.")

data: Decorator = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="UPDRAFT_DATA",
    show_envvar=True,
    default=lambda: data_folder(os.environ),
    help="Data folder of `updraft up`.  [default: ~/.local/share/updraft]",
)

_registry: Decorator = click.option(
    "--registry",
    metavar="HOST:PORT",
    envvar="UPDRAFT_REGISTRY",
    show_envvar=True,
    help=f"Address of the registry.  [default: that of `updraft up`, else {DEFAULT_ADDRESS}]",
)

_speculator: Decorator = click.option(
    "--speculator",
    metavar="NAME",
    envvar="UPDRAFT_SPECULATOR",
    show_envvar=True,
    default="default",
    show_default=True,
    help="Whose drafts.",
)

_FILES = {
    "token_file": "Holds the token to show.",
    "ca_file": "Authority of the registry's certificate, PEM: speak TLS.",
    "cert_file": "Certificate of our own, PEM, for a registry that asks for one.",
    "key_file": "Its key.",
}

CONNECTION = frozenset({"registry", "speculator", "data", *_FILES})
"""Names of the options that stand apart in the help."""


def _credentials(command: Decorated) -> Decorated:
    """Add the files that are shown to a registry. No default: a registry on this machine asks for none."""
    for name, meaning in reversed(_FILES.items()):
        command = click.option(
            f"--{name.replace('_', '-')}",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            envvar=f"UPDRAFT_{name.upper()}",
            show_envvar=True,
            help=meaning,
        )(command)
    return command
