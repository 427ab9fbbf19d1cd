"""`kubectl_complete-updraft`: what kubectl runs to complete `kubectl updraft ...`, and the answer that it expects."""

import sys

import click
from click.shell_completion import CompletionItem, ShellComplete

from updraft_cli.kubectl.__main__ import plugin

_NO_FILES = 4
"""Cobra's ShellCompDirectiveNoFileComp: a shell must not offer files where we offer nothing."""


def main() -> None:
    """Print one candidate a line, with a tab before what it means, and how to take them."""
    *typed, incomplete = sys.argv[1:] or [""]
    for item in candidates(typed, incomplete):
        click.echo(f"{item.value}\t{item.help}" if item.help else item.value)
    click.echo(f":{_NO_FILES}")


def candidates(typed: list[str], incomplete: str) -> list[CompletionItem]:
    """Return what may stand for `incomplete` after the words before it."""
    return ShellComplete(plugin, {}, "kubectl updraft", "").get_completions(typed, incomplete)


if __name__ == "__main__":
    main()
