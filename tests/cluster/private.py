"""A view of the machine in which /run is empty, and writes to /etc, /opt and /var are seen by no one else.

Programs of containers write to fixed places whatever they are told. `python -m tests.cluster.private FOLDER COMMAND ...` runs
a command in that view; it must be in a mount namespace of its own (`unshare --mount`), whose end is the end of the view.
"""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path("/run/updraft")
"""Where the one folder that lasts appears, whatever its place outside: configuration files need not be rendered."""

_SCRATCH = Path("/run/private")


def mount(folder: Path) -> None:
    """Make the view, with `folder` at FOLDER."""
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    FOLDER.mkdir()
    run("mount", "--bind", folder, FOLDER)
    for name in ("etc", "opt", "var"):
        upper, work = _SCRATCH / name / "upper", _SCRATCH / name / "work"
        upper.mkdir(parents=True)
        work.mkdir()
        run("mount", "-t", "overlay", "-o", f"lowerdir=/{name},upperdir={upper},workdir={work}", "overlay", f"/{name}")


def show(path: Path, content: str) -> None:
    """Show a file of our own in the place of `path`, which may be one of the kernel's."""
    shown = _SCRATCH / str(path).strip("/").replace("/", ".")
    shown.write_text(content)
    run("mount", "--bind", shown, path)


def run(*command: str | Path) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True)


if __name__ == "__main__":
    mount(Path(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - it takes our place
