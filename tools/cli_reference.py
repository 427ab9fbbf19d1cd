"""The reference page of the command line, from its own help: a section a command, and once the options that many share."""

import inspect
import re
from collections.abc import Iterable, Iterator

import click

from updraft_cli.__main__ import cli
from updraft_cli.cmd.options import CONNECTION
from updraft_cli.kubectl.__main__ import plugin

_SHARED = "registry-options"


def sections() -> Iterator[str]:
    """The page below its head, as Markdown."""
    context = click.Context(cli, info_name="updraft")
    yield "# The `updraft` command\n"
    yield _prose(cli)
    yield f"Commands that talk to a registry also take the [options of a registry](#{_SHARED}).\n"
    yield from _commands(context)
    yield "## Registry options\n"
    yield _options(context, _connection())


def plugin_sections() -> Iterator[str]:
    """The page of the kubectl plugin, below its head."""
    context = click.Context(plugin, info_name="kubectl updraft")
    yield "# The `kubectl updraft` plugin\n"
    yield _prose(plugin)
    yield from _commands(context)


def _commands(context: click.Context) -> Iterator[str]:
    group = context.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(context):
        inner = click.Context(group.commands[name], parent=context, info_name=name)
        yield from _section(inner)
        if isinstance(inner.command, click.Group):
            yield from _commands(inner)


def _section(context: click.Context) -> Iterator[str]:
    command = context.command
    yield f"## {context.command_path}\n"
    yield _prose(command)
    if isinstance(command, click.Group):
        return
    yield f"```text\n{' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n```\n"
    talks = any(parameter.name == "registry" for parameter in command.params)
    own = [parameter for parameter in command.params if not talks or parameter.name not in CONNECTION]
    if any(isinstance(parameter, click.Option) for parameter in own):
        yield _options(context, own)
    if talks:
        yield f"And the [options of a registry](#{_SHARED}).\n"


def _options(context: click.Context, parameters: Iterable[click.Parameter]) -> str:
    records = (parameter.get_help_record(context) for parameter in parameters if isinstance(parameter, click.Option))
    rows = (f"| `{_cell(names)}` | {_cell(meaning)} |" for names, meaning in filter(None, records))
    return "\n".join(("| option | meaning |", "| --- | --- |", *rows)) + "\n"


def _connection() -> list[click.Parameter]:
    """The shared options, of whichever command has them all."""
    group = cli.commands["draft"]
    assert isinstance(group, click.Group)
    return [parameter for parameter in group.commands["list"].params if parameter.name in CONNECTION]


def _prose(command: click.Command) -> str:
    """Its help; what stands in columns there is set as code."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(_paragraph(paragraph) for paragraph in paragraphs) + "\n"


def _paragraph(text: str) -> str:
    if not text.startswith("\b"):
        return " ".join(text.split())
    lines = text.removeprefix("\b").strip("\n")
    return f"```text\n{lines}\n```"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
