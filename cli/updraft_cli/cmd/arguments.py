"""Arguments of the commands: a speculator, a version, or both; completed from the backend."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import click
from click.shell_completion import CompletionItem

from updraft_chassis.errors import UpdraftError
from updraft_cli.backends.protocol import Version
from updraft_cli.backends.speculators import ROLES
from updraft_cli.cmd.options import Decorator
from updraft_cli.cmd.program import name_speculator, typed_backend

_MAX_HELP = 60


class VersionType(click.ParamType[Version]):
    """Converts to a number from `least` on, or to a role such as `stable`."""

    name = "version"

    def __init__(self, *, least: int = 1) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Version:
        if isinstance(value, int):
            return value
        word = str(value)
        if word in ROLES:
            return word
        number = word.removeprefix("v")
        if not number.isdecimal() or int(number) < self._least:
            self.fail(f"{value!r} is not a version: expected a number from {self._least} on, or {', '.join(ROLES)}")
        return int(number)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [item for item in _versions(ctx) if str(item.value).startswith(incomplete)]


VERSION = VersionType()


def speculator(command: Any) -> Any:
    """Add [NAME]; the backend is then about that speculator."""

    def keep(ctx: click.Context, _: click.Parameter, name: str | None) -> None:
        if name is not None:
            name_speculator(ctx, name)

    argument = click.argument("name", required=False, expose_value=False, callback=keep, shell_complete=_complete_name)
    return argument(command)


def version(*, least: int = 1, is_required: bool = True) -> Decorator:
    """Add [NAME] and a VERSION, which the command gets as `version`."""
    return click.argument(
        "version",
        nargs=-1,
        metavar="[NAME] VERSION" if is_required else "[NAME] [VERSION]",
        callback=partial(_split, VersionType(least=least), is_required),
        shell_complete=_complete_words,
    )


def _split(
    kind: VersionType,
    is_required: bool,  # noqa: FBT001 - bound by position
    ctx: click.Context,
    _: click.Parameter,
    words: tuple[str, ...],
) -> Version | tuple[str, ...] | None:
    if ctx.resilient_parsing:
        return words  # what a completion is about
    match words:
        case ():
            if is_required:
                raise click.UsageError("Missing argument 'VERSION'.")
            return None
        case (word,):
            if not is_required and not _is_version(word):
                name_speculator(ctx, word)
                return None
            return kind.convert(word, None, ctx)
        case (name, word):
            name_speculator(ctx, name)
            return kind.convert(word, None, ctx)
    raise click.UsageError(f"Got unexpected extra argument ({words[-1]})")


def _is_version(word: str) -> bool:
    return word in ROLES or word.removeprefix("v").isdecimal()


def _complete_name(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    if ctx.params.get("speculator"):
        return []
    try:
        names = typed_backend(ctx).names()
    except (UpdraftError, TimeoutError, OSError):
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _complete_words(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer names, and versions of the speculator typed before, or of the only one."""
    words = ctx.params.get(parameter.name or "") or ()
    versions = [item for item in _versions(ctx, *words[:1]) if str(item.value).startswith(incomplete)]
    return versions if words else [*_complete_name(ctx, parameter, incomplete), *versions]


def _versions(ctx: click.Context, name: str | None = None) -> Iterator[CompletionItem]:
    try:
        numbers = typed_backend(ctx, name).numbers()
    except (UpdraftError, TimeoutError, OSError):
        numbers = ()
    for number, text in numbers:
        yield CompletionItem(str(number), help=text if len(text) <= _MAX_HELP else f"{text[: _MAX_HELP - 3]}...")
    yield from (CompletionItem(role) for role in ROLES)
