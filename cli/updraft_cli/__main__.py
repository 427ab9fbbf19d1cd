"""The `updraft` command line."""

from importlib.metadata import version

import click
from click.shell_completion import get_completion_class

from updraft_cli.cmd import draft
from updraft_cli.cmd.attach.server import attach
from updraft_cli.cmd.demo import demo
from updraft_cli.cmd.model import model
from updraft_cli.cmd.program import CONTEXT_SETTINGS, Program
from updraft_cli.cmd.registry_options import REGISTRY
from updraft_cli.cmd.rollout.commands import rollout
from updraft_cli.cmd.size import size
from updraft_cli.cmd.status.command import status
from updraft_cli.cmd.subprograms import operator, registry
from updraft_cli.cmd.tenant.commands import tenant
from updraft_cli.cmd.ui import ui
from updraft_cli.cmd.up import up


@click.group(cls=Program, backend_options=REGISTRY, context_settings=CONTEXT_SETTINGS)
@click.version_option(version("updraft"), message="updraft %(version)s")
def cli() -> None:
    """Speculative decoding with a draft model that learns from the traffic it serves.

    \b
    updraft up              serve, learn and swap drafts on this machine
    updraft attach          learn from your own vLLM or SGLang server
    updraft status          what runs, which draft serves, and its acceptance
    updraft ui              the same in the browser, live: drafts, rollouts, learning, pods
    updraft draft list      all drafts, and why each was accepted or not
    updraft rollout status  the canary, and what it waits for
    updraft tenant list     which drafts learned from whom, and who was forgotten
    updraft size MODEL      how large volumes, memory and network must be to learn for a target
    updraft demo            watch a draft learn from real prompts, and get a report

    Exit codes: 0 done; 1 failed (one sentence on stderr has the reason); 2 wrong usage; `rollout status`, `rollout watch`
    and `registry` have more. Commands that show something take `-o table|wide|json|yaml|name`. Colours are for terminals
    only, and NO_COLOR turns them off. Shell completion: `updraft completion --help`. The same verbs work on a cluster as
    `kubectl updraft`.
    """


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
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


for _command in (
    up,
    attach,
    status,
    ui,
    draft.group(is_registry=True),
    rollout,
    tenant,
    registry,
    operator,
    demo,
    model,
    size,
    completion,
):
    cli.add_command(_command)


def main() -> None:
    cli(prog_name="updraft")


if __name__ == "__main__":
    main()
