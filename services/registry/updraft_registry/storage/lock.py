"""The lock of a registry's data folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from updraft_chassis.errors import Conflict, InvalidInput


def unusable(folder: Path, error: OSError) -> InvalidInput:
    """The error for a folder that the system does not give."""
    return InvalidInput(f"cannot use {folder} ({error.strerror}); set UPDRAFT_REGISTRY_DATA_DIR to a folder")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder, because two registries would delete each other's uploads. The kernel releases the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise unusable(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"another registry uses {folder}; stop it or set another UPDRAFT_REGISTRY_DATA_DIR"
            ) from None
        yield
