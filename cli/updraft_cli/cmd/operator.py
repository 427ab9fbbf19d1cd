"""`updraft operator`: asks the operator's own program, which may be installed without being run here.

The command line knows none of its code.
"""

import importlib.util
import subprocess
import sys

import click

from updraft_chassis.errors import NotFound
from updraft_cli.cmd import options

_FORMS = {"table": "text", "json": "json", "yaml": "yaml"}


@click.group(cls=options.Group)
def operator() -> None:
    """The Kubernetes operator: what it would do."""


@operator.command()
@click.option(
    "-f",
    "--filename",
    "files",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    multiple=True,
    required=True,
    help="YAML with AdaptiveSpeculators; - for stdin. May be given more than once.",
)
@click.option("--offline", is_flag=True, help="Ask no cluster: as if nothing were there yet.")
@options.output("table", "json", "yaml")
def plan(files: tuple[str, ...], form: str, offline: bool) -> None:  # noqa: FBT001 - a flag
    """Print what the operator would create or change for a resource, and change nothing.

    \b
    updraft operator plan -f speculator.yaml            against the cluster of the kubeconfig
    updraft operator plan -f speculator.yaml --offline  against an empty one

    The exit code is that of the operator's program.
    """
    if importlib.util.find_spec("updraft_operator") is None:
        raise NotFound("the operator is not installed here: run this where it runs, or `pip install updraft[operator]`")
    named = [word for file in files for word in ("-f", file)]
    arguments = ["plan", *named, "--output", _FORMS[form], *(["--offline"] if offline else [])]
    done = subprocess.run([sys.executable, "-m", "updraft_operator", *arguments], check=False)  # noqa: S603 - our own
    raise SystemExit(done.returncode)
