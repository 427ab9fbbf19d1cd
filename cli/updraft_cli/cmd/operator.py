"""`updraft operator`."""

import click

from updraft_cli.cmd import options, subprograms
from updraft_cli.cmd.program import Group


@click.group(cls=Group)
def operator() -> None:
    """The Kubernetes operator: preview its changes."""


@operator.command()
@click.option(
    "-f",
    "--filename",
    "files",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    multiple=True,
    required=True,
    help="YAML with AdaptiveSpeculators; - for stdin. Repeatable.",
)
@click.option("--offline", is_flag=True, help="Ask no cluster: assume an empty one.")
@options.output("table", "json", "yaml")
def plan(files: tuple[str, ...], form: str, offline: bool) -> None:  # noqa: FBT001 - a flag
    """Print what the operator would create or change for a resource, and change nothing.

    \b
    updraft operator plan -f speculator.yaml            against the cluster of the kubeconfig
    updraft operator plan -f speculator.yaml --offline  against an empty one

    The exit code is that of the operator's program.
    """
    named = [word for file in files for word in ("-f", file)]
    subprograms.run(
        "operator", "plan", *named, "--output", subprograms.FORMATS[form], *(["--offline"] if offline else [])
    )
