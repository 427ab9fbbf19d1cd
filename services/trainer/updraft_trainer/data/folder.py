"""Locks the trainer's data folder and checks that it is writable, before training starts."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from updraft_chassis.errors import Conflict


@contextmanager
def exclusive(folder: Path, *, setting: str) -> Iterator[Path]:
    """Create and lock the folder until the block ends or the process dies. Conflict, with the name of `setting`, on failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("ab")
    except OSError as error:
        raise Conflict(f"cannot write to {folder} ({error.strerror}); set {setting} to another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another trainer uses {folder}; stop it or set {setting} to another folder") from None
        yield folder
