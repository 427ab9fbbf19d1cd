"""Options that several commands share."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from updraft_cli.folders import data_folder
from updraft_cli.registry import DEFAULT_ADDRESS
from updraft_cli.up.data_folder import DataFolder

Command = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whose drafts, and in which registry."""

    registry: str
    speculator: str


def target(command: Command) -> Command:
    """Add --registry, --speculator and --data; the command gets a `Target` as its first argument."""

    @registry
    @_speculator
    @data
    @functools.wraps(command)
    def wrapped(registry: str | None, speculator: str, data: Path, **rest: Any) -> Any:
        return command(Target(registry=registry_address(registry, data), speculator=speculator), **rest)

    return wrapped


def registry_address(given: str | None, data: Path) -> str:
    """Return the registry's address: as given, else that of the stack on `data`, else the default."""
    if given:
        return given
    running = DataFolder(data).read_state()
    return running.registry_address if running else DEFAULT_ADDRESS


data: Callable[[Command], Command] = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="UPDRAFT_DATA",
    show_envvar=True,
    default=lambda: data_folder(os.environ),
    help="Data folder of `updraft up`.  [default: ~/.local/share/updraft]",
)

output: Callable[[Command], Command] = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="For a person or for a program.",
)

registry: Callable[[Command], Command] = click.option(
    "--registry",
    metavar="HOST:PORT",
    envvar="UPDRAFT_REGISTRY",
    show_envvar=True,
    help=f"Address of the registry.  [default: that of `updraft up`, else {DEFAULT_ADDRESS}]",
)

_speculator: Callable[[Command], Command] = click.option(
    "--speculator",
    metavar="NAME",
    envvar="UPDRAFT_SPECULATOR",
    show_envvar=True,
    default="default",
    show_default=True,
    help="Whose drafts.",
)
