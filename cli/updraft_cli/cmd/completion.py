"""`updraft completion`: the script that teaches a shell our commands."""

import click
from click.shell_completion import get_completion_class

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what teaches a shell to complete our commands.

    \b
    bash   echo 'eval "$(updraft completion bash)"' >> ~/.bashrc
    zsh    echo 'eval "$(updraft completion zsh)"' >> ~/.zshrc
    fish   updraft completion fish > ~/.config/fish/completions/updraft.fish

    Options are completed too, and version numbers from the registry; when none answers at once, nothing is offered.
    """
    script = get_completion_class(shell)
    if script is None:
        raise AssertionError(f"click knows no {shell}")
    click.echo(script(ctx.find_root().command, {}, "updraft", "_UPDRAFT_COMPLETE").source())
