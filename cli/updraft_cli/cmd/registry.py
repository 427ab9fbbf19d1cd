"""`updraft registry`: the data folder of a registry that is stopped."""

import os
from pathlib import Path

import click

from updraft_cli.cmd import options, subprograms
from updraft_cli.cmd.program import Group
from updraft_cli.local.folders import data_folder


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
    _run("fsck", data_dir or data / "registry", form, *flags)


@registry.command()
@options.output("table", "json")
@_data_dir
@_data
def rebuild(form: str, data_dir: Path | None, data: Path) -> None:
    """Rebuild the catalogue from the documents stored with the weights. The old catalogue is kept."""
    _run("rebuild", data_dir or data / "registry", form)


def _run(command: str, folder: Path, form: str, *flags: str) -> None:
    subprograms.run("registry", command, "--data-dir", str(folder), "--output", subprograms.FORMATS[form], *flags)
