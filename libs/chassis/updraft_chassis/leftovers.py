"""Incomplete files and folders of processes that were killed."""

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

STALE_S = 3600.0


def remove_stale(paths: Iterable[Path]) -> None:
    """Remove files and folders in which nothing was written for an hour. A process that is alive writes more often.

    What cannot be removed is left, without an error.
    """
    for path in paths:
        with suppress(OSError):
            if time.time() - _written(path) > STALE_S:
                rmtree(path) if path.is_dir() else path.unlink()


def _written(path: Path) -> float:
    """The time of the last write to a file, or to anything in a folder, in seconds since 1970."""
    return max(one.lstat().st_mtime for one in (path, *path.rglob("*")))
