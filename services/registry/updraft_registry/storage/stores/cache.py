"""A folder of files that can be recreated. The least recently used are deleted first.

A file appears by rename, so it is always complete. Nothing is synced, because any file may be lost.
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
    """A folder of at most `max_bytes`, except that the newest file always stays. Thread-safe."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"*{_PART}"):
            left.unlink()

    def open(self, name: str) -> BinaryIO | None:
        """Open a file; None if it is not cached. The caller closes it."""
        try:
            file = (self._folder / name).open("rb")
        except FileNotFoundError:
            return None
        with suppress(FileNotFoundError):  # evicted by another thread, but still readable
            os.utime(self._folder / name)
        return file

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Write a new file, which appears if the block succeeds. Exhausted on a full disk."""
        part = self._folder / f"{uuid.uuid4().hex}{_PART}"
        try:
            with disk_errors(self._folder):
                with part.open("xb") as file:
                    yield file
                self.adopt(name, part)
        finally:
            part.unlink(missing_ok=True)

    def adopt(self, name: str, path: Path) -> None:
        """Move a file on the same disk into the cache."""
        with self._lock:
            path.replace(self._folder / name)
            self._evict(keep=name)

    def names(self) -> list[str]:
        """Names of all files."""
        return [path.name for path in self._folder.iterdir() if path.suffix != _PART]

    def delete(self, is_unwanted: Callable[[str], bool]) -> None:
        """Delete files by name. Open files stay readable."""
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
