"""`updraft completion`."""

import click
from click.shell_completion import get_completion_class

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash   echo 'eval "$(updraft completion bash)"' >> ~/.bashrc
    zsh    echo 'eval "$(updraft completion zsh)"' >> ~/.zshrc
    fish   updraft completion fish > ~/.config/fish/completions/updraft.fish

    Names and version numbers come from the registry. If it does not answer at once, they are not offered.
    """
    script = get_completion_class(shell)
    if script is None:
        raise AssertionError(f"click knows no {shell}")
    click.echo(script(ctx.find_root().command, {}, "updraft", "_UPDRAFT_COMPLETE").source())
