"""Files that can be had again, by name in a folder: the least recently used go first when they are too many.

A file appears by rename, whole. Nothing is synced and nothing depends on it: a crash may take any of them.
"""

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from updraft_registry.storage.stores.folder import disk_errors

_PART = ".part"


class Cache:
    """A folder of at most `max_bytes`, and of at least the file that came last. For any thread."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"*{_PART}"):
            left.unlink()

    def open(self, name: str) -> BinaryIO | None:
        """A file to read, and to be closed by the caller; None if it is not here."""
        try:
            file = (self._folder / name).open("rb")
        except FileNotFoundError:
            return None
        with suppress(FileNotFoundError):  # evicted by another thread; it can be read all the same
            os.utime(self._folder / name)
        return file

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Write a new file; it is here if the block ends well. Exhausted when the disk is full."""
        part = self._folder / f"{uuid.uuid4().hex}{_PART}"
        try:
            with disk_errors(self._folder):
                with part.open("xb") as file:
                    yield file
                self.adopt(name, part)
        finally:
            part.unlink(missing_ok=True)

    def adopt(self, name: str, path: Path) -> None:
        """Take over a file from the same disk."""
        with self._lock:
            path.replace(self._folder / name)
            self._evict(keep=name)

    def names(self) -> list[str]:
        """All files that are here."""
        return [path.name for path in self._folder.iterdir() if path.suffix != _PART]

    def delete(self, is_unwanted: Callable[[str], bool]) -> None:
        """Delete files by name. Who reads one now reads it to its end."""
        for name in filter(is_unwanted, self.names()):
            (self._folder / name).unlink(missing_ok=True)

    def _evict(self, *, keep: str) -> None:
        files = [((self._folder / name).stat(), name) for name in self.names()]
        total = sum(stat.st_size for stat, _ in files)
        for stat, name in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if total <= self._max_bytes:
                break
            if name != keep:
                (self._folder / name).unlink(missing_ok=True)
                total -= stat.st_size
