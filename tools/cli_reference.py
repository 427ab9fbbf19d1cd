"""The reference page of a command line, from its own help: a section per command, and once the options that many share."""

import inspect
from collections.abc import Iterable, Iterator

import click
from tools import markdown

from updraft_cli.cmd.program import Command, Program


def sections(program: Program, name: str) -> Iterator[str]:
    """The page of a program below its title."""
    context = click.Context(program, info_name=name)
    title = program.backend_options.title
    yield _prose(program)
    yield f"Commands that use a {title.lower()} also take the [{title.lower()} options](#{title.lower()}-options).\n"
    yield from _commands(context)
    yield f"## {title} options\n"
    yield _options(context, program.backend_options.by_need["connection"])


def _commands(context: click.Context) -> Iterator[str]:
    group = context.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(context):
        if group.commands[name].hidden:
            continue
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
    shared = command.shared_options(context) if isinstance(command, Command) else ()
    own = [p for p in command.get_params(context) if p.name != "help" and p not in shared]
    if any(isinstance(parameter, click.Option) for parameter in own):
        yield _options(context, own)
    if shared:
        root = context.find_root().command
        assert isinstance(root, Program)
        title = root.backend_options.title.lower()
        yield f"And the [{title} options](#{title}-options).\n"


def _options(context: click.Context, parameters: Iterable[click.Parameter]) -> str:
    records = (parameter.get_help_record(context) for parameter in parameters if isinstance(parameter, click.Option))
    return markdown.table(("option", "meaning"), [(f"`{names}`", meaning) for names, meaning in filter(None, records)])


def _prose(command: click.Command) -> str:
    """Its help; what stands in columns there is set as code."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(_paragraph(paragraph) for paragraph in paragraphs) + "\n"


def _paragraph(text: str) -> str:
    if not text.startswith("\b"):
        return " ".join(text.split())
    lines = text.removeprefix("\b").strip("\n")
    return f"```text\n{lines}\n```"
