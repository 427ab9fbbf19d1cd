"""`updraft registry`: looks after the data folder of a registry that is stopped.

The registry's own program does it; the command line knows none of its code, and may be installed without it.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import click

from updraft_chassis.errors import NotFound
from updraft_cli.cmd import options

_FORMS = {"table": "text", "json": "json"}


@click.group(cls=options.Group)
def registry() -> None:
    """The data folder of a registry: check it, mend it. Stop the registry first.

    \b
    Exit codes:
      0  all is sound, or all that was not is mended
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


@registry.command()
@click.option("--repair", is_flag=True, help="Mend what can be mended.")
@click.option("--no-hash", is_flag=True, help="Do not read the weights, which may be many gigabytes.")
@options.output("table", "json")
@_data_dir
@options.data
def fsck(repair: bool, no_hash: bool, form: str, data_dir: Path | None, data: Path) -> None:  # noqa: FBT001 - flags
    """Check that weights, documents and catalogue are whole and say the same."""
    flags = [*(["--repair"] if repair else []), *(["--no-hash"] if no_hash else [])]
    _run("fsck", data_dir or data / "registry", form, *flags)


@registry.command()
@options.output("table", "json")
@_data_dir
@options.data
def rebuild(form: str, data_dir: Path | None, data: Path) -> None:
    """Make the catalogue anew from the documents beside the weights. The old one is kept."""
    _run("rebuild", data_dir or data / "registry", form)


def _run(command: str, folder: Path, form: str, *flags: str) -> None:
    """Run the registry's own program, and end with its exit code."""
    if importlib.util.find_spec("updraft_registry") is None:
        raise NotFound("the registry is not installed here: run this where it runs, or `pip install updraft[registry]`")
    arguments = [command, "--data-dir", str(folder), "--output", _FORMS[form], *flags]
    done = subprocess.run([sys.executable, "-m", "updraft_registry", *arguments], check=False)  # noqa: S603 - our own
    raise SystemExit(done.returncode)
