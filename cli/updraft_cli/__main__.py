"""The `updraft` command: commands, and the one place where an error becomes a sentence and an exit code."""

from importlib.metadata import version

import click

from updraft_chassis.errors import UpdraftError
from updraft_cli.cmd import options
from updraft_cli.cmd.completion import completion
from updraft_cli.cmd.demo import demo
from updraft_cli.cmd.draft.commands import draft
from updraft_cli.cmd.model import model
from updraft_cli.cmd.operator import operator
from updraft_cli.cmd.registry import registry
from updraft_cli.cmd.rollout.commands import group as rollout
from updraft_cli.cmd.status.command import status
from updraft_cli.cmd.up import up


class Updraft(options.Group):
    """A group whose commands may raise `UpdraftError`s."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; an UpdraftError ends it with its sentence on stderr and exit code 1."""
        try:
            return super().invoke(ctx)
        except UpdraftError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Updraft, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("updraft"), message="updraft %(version)s")
def cli() -> None:
    """Speculative decoding with a draft model that learns from the traffic it serves.

    \b
    updraft up              serve, learn and swap drafts on this machine
    updraft status          what runs, which draft serves, how much of it is accepted
    updraft draft list      all drafts, and why each was taken or not
    updraft rollout status  what is tried now, and what it waits for
    updraft demo            watch a draft learn from real prompts, and get a report

    Exit codes: 0 done, 1 it could not be done (one sentence on stderr says why), 2 wrong usage; `rollout status`,
    `rollout watch` and `registry` have more. Commands that show something take `-o table|wide|json|yaml|name`.
    Colours are for terminals only, and NO_COLOR turns them off. Shell completion: `updraft completion --help`.
    """


for command in (up, status, draft, rollout, registry, operator, demo, model, completion):
    cli.add_command(command)


def main() -> None:
    """Run the command line; exits the process."""
    cli(prog_name="updraft")


if __name__ == "__main__":
    main()
