"""The `kubectl updraft` plugin: kubectl runs `kubectl-updraft` from the PATH, and `kubectl_complete-updraft` to complete it."""

import copy
import sys

import click
from click.shell_completion import CompletionItem, ShellComplete

from updraft_cli.cmd import decisions, draft
from updraft_cli.cmd.attach.workload import attach
from updraft_cli.cmd.cluster_options import CLUSTER
from updraft_cli.cmd.draft import commands
from updraft_cli.cmd.explain.command import explain
from updraft_cli.cmd.program import CONTEXT_SETTINGS, Program
from updraft_cli.cmd.rollout.commands import rollout
from updraft_cli.cmd.rotation.command import rotate
from updraft_cli.cmd.status.command import status
from updraft_cli.cmd.ui import ui
from updraft_cli.cmd.upgrade.commands import upgrade

_NO_FILES = 4
"""Cobra's ShellCompDirectiveNoFileComp: the shell must not offer file names when we offer nothing."""

_SHORT = {
    "versions": commands.list_,
    "history": commands.history,
    "pin": decisions.pin,
    "unpin": decisions.unpin,
    "promote": decisions.promote,
    "pause": decisions.pause,
    "resume": decisions.resume,
}
"""Older spellings without a noun."""


@click.group("updraft", cls=Program, backend_options=CLUSTER, context_settings=CONTEXT_SETTINGS)
@click.version_option(package_name="updraft", message="kubectl-updraft %(version)s")
def plugin() -> None:
    """Draft models that learn from traffic: how they perform, and which of them serves.

    \b
    kubectl updraft status            the state of every speculator in the namespace
    kubectl updraft ui                the same in the browser, live; decisions are patches with your rights
    kubectl updraft explain NAME      its problems, and how to fix them
    kubectl updraft attach NAME ...   how to attach it to a workload of your own
    kubectl updraft draft list NAME   its drafts, and why each was accepted or not
    kubectl updraft draft pin NAME 3  serve version 3 now; `draft unpin` ends it
    kubectl updraft rollout watch     follow a rollout until it is over
    kubectl updraft rotate NAME       new passwords for its Redis users, without a failure
    kubectl updraft upgrade plan      pods that still restart for a newer operator, and when

    Everything is read from the API server, `ui` also reads registries if your role permits it, and a decision is
    a field of the resource: your role permits what `kubectl patch` would. The verbs are those of `updraft`, which
    talks to a registry. NAME may be left out if the namespace has one AdaptiveSpeculator. Exit codes: 0 done, or
    already so; 1 failed (one sentence on stderr has the reason); 2 wrong usage; `rollout status` and `rollout
    watch` have more.
    """


for _command in (status, explain, attach, ui, draft.group(is_registry=False), rollout, rotate, upgrade):
    plugin.add_command(_command)
for _name, _command in _SHORT.items():
    _alias = copy.copy(_command)
    _alias.hidden = True
    plugin.add_command(_alias, _name)


def main() -> None:
    plugin(prog_name="kubectl updraft")


def complete() -> None:
    """Print one candidate per line, with its meaning after a tab, and a directive for the shell."""
    *typed, incomplete = sys.argv[1:] or [""]
    for item in candidates(typed, incomplete):
        click.echo(f"{item.value}\t{item.help}" if item.help else item.value)
    click.echo(f":{_NO_FILES}")


def candidates(typed: list[str], incomplete: str) -> list[CompletionItem]:
    return ShellComplete(plugin, {}, "kubectl updraft", "").get_completions(typed, incomplete)


if __name__ == "__main__":
    main()
