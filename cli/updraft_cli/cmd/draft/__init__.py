"""`draft`: look at versions, decide on them, copy them, and train a first one."""

from updraft_cli.cmd import decisions
from updraft_cli.cmd.draft import commands, registry_commands, training
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
REGISTRY_ONLY = (
    registry_commands.pull,
    registry_commands.import_,
    registry_commands.reject,
    registry_commands.retain,
    training.train,
)

HELP = """Draft versions: look at them, decide on them, copy them, train a first one.

VERSION is a number, or a role: stable, candidate, previous, latest.
"""


def group(*, is_registry: bool) -> Group:
    commands = (*SHARED, *REGISTRY_ONLY) if is_registry else SHARED
    return Group(
        "draft",
        commands=list(commands),
        help=HELP if is_registry else HELP.replace(", copy them, train a first one", ""),
    )
