"""Temporary folders of nodes: those whose process was killed are found again, and too small a disk is one sentence."""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "updraft-"
_OWNER = "owner"
"""A file that the process which made the folder keeps locked for as long as it lives."""


@contextmanager
def owned() -> Iterator[Path]:
    """A new folder that is this process's; the caller removes it."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    part = folder / f"{_OWNER}.part"
    with part.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        part.rename(folder / _OWNER)  # nobody finds it unlocked
        yield folder


def abandoned() -> Iterator[Path]:
    """Folders whose process has gone; the caller removes each before it asks for the next."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_OWNER}"):
        # Another process may be removing it at the same time.
        with suppress(FileNotFoundError), owner.open() as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield owner.parent


def shortage(folder: Path, num_gb: float, purpose: str) -> str:
    """One sentence when so much is not free where this folder is; empty when it is."""
    free = shutil.disk_usage(folder).free / 1e9
    said = f"{num_gb:.1f} GB of disk are needed in {folder}, and {free:.1f} GB are free"
    return f"for {purpose}, {said}" if free < num_gb else ""
