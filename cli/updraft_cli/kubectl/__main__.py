"""The `kubectl updraft` command: kubectl runs `kubectl-updraft` from the PATH with the words that follow."""

import click

from updraft_chassis.errors import UpdraftError
from updraft_cli.cmd import options
from updraft_cli.kubectl.deciding import DECISIONS
from updraft_cli.kubectl.looking import LOOKS


class Plugin(options.Group):
    """A group whose commands may raise `UpdraftError`s."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; an UpdraftError ends it with its sentence on stderr and exit code 1."""
        try:
            return super().invoke(ctx)
        except UpdraftError as error:
            raise click.ClickException(str(error)) from error


@click.group("updraft", cls=Plugin, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="updraft", message="kubectl-updraft %(version)s")
def plugin() -> None:
    """Drafts that learn: how they do, and which of them serves.

    \b
    kubectl updraft status          how every speculator of the namespace is
    kubectl updraft explain NAME    what is amiss, and what to do
    kubectl updraft versions NAME   its drafts, and why each was taken or not
    kubectl updraft pin NAME 3      serve version 3 now; `unpin` ends it

    All is read from the API server, and decisions are fields of the resource: what your role allows, and nothing else.
    NAME may be left out where the namespace has one AdaptiveSpeculator. Exit codes: 0 done, or so already; 1 it could
    not be done (one sentence on stderr says why); 2 wrong usage.
    """


for command in (*LOOKS, *DECISIONS):
    plugin.add_command(command)


def main() -> None:
    """Run the command line; exits the process."""
    plugin(prog_name="kubectl updraft")


if __name__ == "__main__":
    main()
