"""`updraft attach`: shows what your own server needs, and what a running one lacks."""

from pathlib import Path
from typing import Any

import click

from updraft_cli.attach import findings, server
from updraft_cli.attach.needs import TITLES, Needs
from updraft_tap import __version__


@click.command()
@click.option("--engine", type=click.Choice(["sglang", "vllm"]), required=True, help="Engine of the server.")
@click.option("--check", "url", metavar="URL", help="Report what the running server at this URL lacks.")
@click.option("--model", default="MODEL", show_default=True, help="Folder of the target model in the printed commands.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("updraft"),
    show_default=True,
    help="Folder for the plugin, the initial draft and the socket. Both server and agent must see it.",
)
@click.option("--lookahead", type=click.IntRange(1, 16), default=3, show_default=True, help="Draft tokens per step.")
@click.option(
    "--tensor-parallel-size",
    "num_ranks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Tensor-parallel ranks. With several of SGLang, the server's admin key is part of the printed commands.",
)
@click.option("--require-keys", is_flag=True, help="With --check: report a server that requires no API key.")
@click.option(
    "--key", envvar="UPDRAFT_API_KEY", show_envvar=True, default="", help="API key of the server, if it requires one."
)
def attach(url: str | None, key: str, require_keys: bool, **files: Any) -> None:  # noqa: FBT001 - a flag
    """Train a draft on the traffic of your own server.

    Prints the environment and arguments for the server, and the command for the agent beside it. With --check, queries a
    running server and reports what is missing and what to add. The exit code is 0 if nothing is missing, else 1.
    """
    needs = Needs(
        engine=files["engine"],
        model=files["model"],
        folder=files["folder"].absolute(),
        num_steps=files["lookahead"],
        num_ranks=files["num_ranks"],
        **({} if url is None else {"url": url}),
    )
    if url is None:
        _print_lines(needs)
        return
    answers = server.ask(needs.engine, url, key)
    missing = findings.found(needs, answers, ours=__version__, needs_keys=require_keys)
    if answers.version is not None:
        click.echo(f"{TITLES[needs.engine]} {answers.version} at {url}")
    for finding in missing:
        click.echo(f"missing: {finding.problem}\n  {finding.remedy}")
    if missing:
        raise click.exceptions.Exit(1)
    click.echo("Nothing is missing.")


def _print_lines(needs: Needs) -> None:
    on_a_cpu = "; on a CPU, also --enforce-eager" if needs.engine == "vllm" else ""
    lines = {
        "Once: write the plugin and an initial draft": needs.prepare,
        "The server's environment": needs.environment,
        f"The server's arguments{on_a_cpu}": needs.arguments,
        "The agent, on the same machine or in the same pod": needs.sidecar,
    }
    for title, line in lines.items():
        click.echo(f"# {title}\n{line}")
