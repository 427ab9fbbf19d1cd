"""`updraft registry` and `updraft operator`, which run another part's own program.

The command line knows none of its code, and may be installed without it.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import click

from updraft_chassis.errors import NotFound
from updraft_cli.cmd import options
from updraft_cli.cmd.program import Group
from updraft_cli.local.folders import data_folder

_FORMATS = {"table": "text", "json": "json", "yaml": "yaml"}
"""The programs' names for our formats."""


@click.group(cls=Group)
def registry() -> None:
    """The data folder of a registry: check and repair it. Stop the registry first.

    \b
    Exit codes:
      0  all is sound, or everything that was damaged is repaired
      3  damage is left
      1  it could not be checked: a registry runs on it, the disk is full
      2  wrong usage, or a wrong setting in the environment
    """


_data_dir = click.option(
    "--data-dir",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="UPDRAFT_REGISTRY_DATA_DIR",
    show_envvar=True,
    help="The registry's own folder.  [default: `registry` in that of `updraft up`]",
)
_data = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="UPDRAFT_DATA",
    show_envvar=True,
    default=lambda: data_folder(os.environ),
    help="Data folder of `updraft up`.  [default: ~/.local/share/updraft]",
)


@registry.command()
@click.option("--repair", is_flag=True, help="Repair what can be repaired.")
@click.option("--no-hash", is_flag=True, help="Do not read the weights, which may be many gigabytes.")
@options.output("table", "json")
@_data_dir
@_data
def fsck(repair: bool, no_hash: bool, form: str, data_dir: Path | None, data: Path) -> None:  # noqa: FBT001 - flags
    """Check that weights, documents and catalogue are whole and agree."""
    flags = [*(["--repair"] if repair else []), *(["--no-hash"] if no_hash else [])]
    _run_on("fsck", data_dir or data / "registry", form, *flags)


@registry.command()
@options.output("table", "json")
@_data_dir
@_data
def rebuild(form: str, data_dir: Path | None, data: Path) -> None:
    """Rebuild the catalogue from the documents stored with the weights. The old catalogue is kept."""
    _run_on("rebuild", data_dir or data / "registry", form)


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
    """Print what the operator would create or change for AdaptiveSpeculators, and change nothing.

    \b
    updraft operator plan -f speculator.yaml            against the cluster of the kubeconfig
    updraft operator plan -f speculator.yaml --offline  against an empty one

    The exit code is that of the operator's program.
    """
    named = [word for file in files for word in ("-f", file)]
    _run("operator", "plan", *named, "--output", _FORMATS[form], *(["--offline"] if offline else []))


def _run_on(command: str, folder: Path, form: str, *flags: str) -> None:
    _run("registry", command, "--data-dir", str(folder), "--output", _FORMATS[form], *flags)


def _run(part: str, *arguments: str) -> NoReturn:
    """Run `python -m updraft_<part>`, and exit with its exit code."""
    if importlib.util.find_spec(f"updraft_{part}") is None:
        raise NotFound(f"the {part} is not installed here; in a checkout, run pip install '.[{part}]'")
    command = [sys.executable, "-m", f"updraft_{part}", *arguments]
    raise SystemExit(subprocess.run(command, check=False).returncode)  # noqa: S603 - our own program
