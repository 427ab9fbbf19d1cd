"""One set of commands over two backends: each program adds the options that reach its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import click

from updraft_chassis.errors import UpdraftError
from updraft_cli.backends.protocol import Backend

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_SPECULATOR = "updraft.speculator"
"""Key of the NAME argument in a context's `meta`."""

_CHANGES = frozenset({"decision", "change", "console"})
"""Needs of commands that change something, or that let a person do so."""


class Connect(Protocol):
    """Makes a backend from a program's options, by parameter name; while a shell completes, some are missing.

    Before a change it must be clear which backend is meant.
    """

    def __call__(self, given: Mapping[str, Any], speculator: str | None, *, is_change: bool = False) -> Backend: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """The options of one kind of backend, by the need that a command declares."""

    title: str
    """Heading of the options in the help."""
    by_need: Mapping[str, Sequence[click.Option]]
    connect: Connect
    left_out: frozenset[str] = frozenset()
    """Parameters of commands that this backend cannot carry out."""


class Command(click.Command):
    """A command; one with `needs` also takes its program's options for them, and gets a `backend`."""

    def __init__(self, *args: Any, needs: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.needs = needs

    def backend_options(self, ctx: click.Context) -> list[click.Option]:
        by_need = program(ctx).backend_options.by_need if self.needs else {}
        return [option for need in self.needs for option in by_need.get(need, ())]

    def shared_options(self, ctx: click.Context) -> Sequence[click.Option]:
        """Return those that reach the backend, which most commands take."""
        return program(ctx).backend_options.by_need.get("connection", ()) if "connection" in self.needs else ()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, help_option = super().get_params(ctx)
        if self.needs:
            left_out = program(ctx).backend_options.left_out
            own = [parameter for parameter in own if parameter.name not in left_out]
        return [*own, *self.backend_options(ctx), help_option]

    def invoke(self, ctx: click.Context) -> Any:
        if self.needs:
            names = {option.name for option in self.backend_options(ctx)}
            given = {name: ctx.params.pop(name) for name in names}
            ctx.params["backend"] = program(ctx).backend_options.connect(
                given, ctx.meta.get(_SPECULATOR), is_change=not _CHANGES.isdisjoint(self.needs)
            )
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options that many commands share in a section of their own."""
        shared = self.shared_options(ctx)
        own = [parameter for parameter in self.get_params(ctx) if parameter not in shared]
        title = program(ctx).backend_options.title if self.needs else ""
        for heading, parameters in (("Options", own), (title, shared)):
            records = [record for parameter in parameters if (record := parameter.get_help_record(ctx))]
            options = [record for record in records if record[0].startswith("-")]
            if options:
                with formatter.section(heading):
                    formatter.write_dl(options)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


class Program(Group):
    """A whole command line; an UpdraftError ends it with its sentence on stderr and exit code 1."""

    def __init__(self, *args: Any, backend_options: BackendOptions, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.backend_options = backend_options

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except UpdraftError as error:
            raise click.ClickException(str(error)) from error


def program(ctx: click.Context) -> Program:
    root = ctx.find_root().command
    assert isinstance(root, Program)
    return root


def name_speculator(ctx: click.Context, name: str) -> None:
    """Remember the speculator that an argument names."""
    ctx.meta[_SPECULATOR] = name


def typed_backend(ctx: click.Context, name: str | None = None) -> Backend:
    """Return the backend for the options typed so far, while a shell completes."""
    return program(ctx).backend_options.connect(ctx.params, name or ctx.meta.get(_SPECULATOR))
