"""`draft`: look at versions, decide on them, and copy them."""

from updraft_cli.cmd import decisions
from updraft_cli.cmd.draft import commands, registry_commands
from updraft_cli.cmd.program import Group

SHARED = (
    commands.list_,
    commands.show,
    commands.diff,
    commands.history,
    decisions.pin,
    decisions.unpin,
    decisions.promote,
)
REGISTRY_ONLY = (registry_commands.pull, registry_commands.import_, registry_commands.reject, registry_commands.retain)

HELP = """Draft versions: look at them, decide on them, copy them.

VERSION is a number, or a role: stable, candidate, previous, latest.
"""


def group(*, is_registry: bool) -> Group:
    commands = (*SHARED, *REGISTRY_ONLY) if is_registry else SHARED
    return Group("draft", commands=list(commands), help=HELP if is_registry else HELP.replace(", copy them", ""))
