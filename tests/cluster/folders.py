"""Temporary folders of nodes: those whose process was killed are found again, and too small a disk is one sentence."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "updraft-node-"
_OWNER = "owner"
"""A file that the process which made the folder keeps locked for as long as it lives."""


@contextmanager
def owned() -> Iterator[Path]:
    """A new folder that is this process's; the caller removes it."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    part = folder / f"{_OWNER}.part"
    with part.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        part.rename(folder / _OWNER)  # locked before anybody looks for it
        yield folder


def abandoned() -> Iterator[Path]:
    """Folders whose process has gone; the caller removes each before it asks for the next."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_OWNER}"):
        # Another process may be removing it at the same time. Anybody can make a folder with such a name.
        with suppress(FileNotFoundError):
            if owner.parent.lstat().st_uid != os.geteuid():
                continue
            with owner.open() as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield owner.parent


def remove(folder: Path) -> None:
    """Remove a folder, if there is one, as far as that is possible; while anything of it is left, so is its owner's file."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _OWNER:
            path.unlink(missing_ok=True)
    if {path.name for path in folder.iterdir()} <= {_OWNER}:
        shutil.rmtree(folder, ignore_errors=True)


def shortage(folder: Path, num_gb: float, work: str) -> str:
    """One sentence if less than this is free on the folder's disk; empty otherwise."""
    free = shutil.disk_usage(folder).free / 1e9
    return f"{work} needs {num_gb:.1f} GB of disk in {folder}, but only {free:.1f} GB are free" if free < num_gb else ""
