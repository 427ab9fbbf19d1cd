"""A full disk, for this process only, a small one, old files, and what a killed process leaves."""

import os
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writes beyond this size of a file fail in this process, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def age(path: Path, *, hours: float) -> None:
    """Make a file, or a folder and all that it holds, appear as last written so long ago."""
    then = time.time() - 3600 * hours
    for one in (path, *path.rglob("*")):
        os.utime(one, (then, then))


@contextmanager
def no_cleanup() -> Iterator[None]:
    """Files are not unlinked, so that an error leaves what a kill would leave."""
    with patch.object(Path, "unlink", lambda *_args, **_options: None):
        yield


@contextmanager
def no_file_opens() -> Iterator[None]:
    """Within the block this process may open no more files (EMFILE)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of this size in a new folder; needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
