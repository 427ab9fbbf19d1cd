"""Blobs in a folder: a local disk or a mounted volume.

    uploads/<random>.part                 on their way in; emptied at start
    blobs/sha256/<hex>                    whole and verified, or not there
    versions/<speculator>/<number>.json   what the catalogue can be rebuilt from

A name appears by rename, once its bytes are on disk, and the folder is synced afterwards, so a crash or a full disk leaves
the old or the new state. Network file systems without atomic rename are not supported.
"""

import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from shutil import disk_usage
from typing import BinaryIO

from updraft_chassis.durable import sync
from updraft_chassis.errors import Corrupt, Exhausted, InvalidInput, NotFound, Unavailable, full_disk_as_exhausted
from updraft_registry.storage.stores.port import Upload

_ALGORITHM = "sha256"


class FolderStore:
    """A `Store` in a folder, which it creates; see `port.Store` for what each call promises."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._uploads = root / "uploads"
        self._blobs = root / "blobs" / _ALGORITHM
        self._versions = root / "versions"
        with disk_errors(root):
            for folder in (self._uploads, self._blobs, self._versions):
                folder.mkdir(parents=True, exist_ok=True)

    @property
    def shares_disk(self) -> bool:
        return True

    def clean(self) -> int:
        return clean_uploads(self._uploads)

    def free_bytes(self) -> int:
        return disk_usage(self._uploads).free

    def volume_bytes(self) -> int:
        return disk_usage(self._blobs).total

    def begin(self, size_bytes: int) -> "FolderUpload":
        return begin_upload(self._uploads, size_bytes, free_bytes=self.free_bytes())

    def prepare(self, upload: Upload, digest: str) -> None:
        """Nothing to do: a rename is fast."""

    def commit(self, upload: Upload, digest: str) -> None:
        with disk_errors(self._root):
            upload.path.replace(self._blob(digest))
            sync(self._blobs)

    def open(self, digest: str) -> BinaryIO:
        try:
            return self._blob(digest).open("rb")
        except FileNotFoundError:
            raise NotFound(f"no blob {digest} is stored") from None

    def link(self, digest: str) -> str | None:
        """None, because only the registry reads this folder."""

    def digests(self) -> frozenset[str]:
        return frozenset(f"{_ALGORITHM}:{path.name}" for path in self._blobs.iterdir())

    def delete(self, digest: str) -> None:
        self._blob(digest).unlink(missing_ok=True)

    def documents(self) -> Iterator[tuple[str, int]]:
        for path in sorted(self._versions.glob("*/*.json")):
            if path.stem.isdecimal():
                yield path.parent.name, int(path.stem)

    def read_document(self, speculator: str, number: int) -> bytes:
        try:
            return self._document(speculator, number).read_bytes()
        except FileNotFoundError:
            return b""

    def write_document(self, speculator: str, number: int, content: bytes) -> None:
        path = self._document(speculator, number)
        part = self._uploads / f"{uuid.uuid4().hex}.part"
        with disk_errors(self._root):
            try:
                path.parent.mkdir(exist_ok=True)
                with part.open("xb") as file:
                    file.write(content)
                    _sync(file)
                part.replace(path)
                sync(path.parent)
            finally:
                part.unlink(missing_ok=True)

    def delete_document(self, speculator: str, number: int) -> None:
        self._document(speculator, number).unlink(missing_ok=True)

    def _blob(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix(f"{_ALGORITHM}:")

    def _document(self, speculator: str, number: int) -> Path:
        return self._versions / speculator / f"{number}.json"


def clean_uploads(folder: Path) -> int:
    """Delete what interrupted uploads left in `folder`; return how many."""
    left = list(folder.iterdir())
    for path in left:
        path.unlink()
    return len(left)


def begin_upload(folder: Path, size_bytes: int, *, free_bytes: int) -> "FolderUpload":
    """Start an upload to a file in `folder`; Exhausted when there is no room for it."""
    if size_bytes > free_bytes:
        raise Exhausted(
            f"{folder} has {free_bytes} bytes left, the draft needs {size_bytes}: "
            "free some space or move UPDRAFT_REGISTRY_DATA_DIR"
        )
    return FolderUpload(folder / f"{uuid.uuid4().hex}.part", size_bytes)


class FolderUpload:
    """An `Upload` to a temporary file, hashed while it is written; see `port.Upload` for what each call promises.

    The lock is for disconnects: `discard` may then run while a write is still running on its thread.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._is_discarded = False
        self._expected_bytes = size_bytes
        self._size_bytes = 0
        self._hash = hashlib.sha256()

    @property
    def path(self) -> Path:
        return self._path

    def write(self, offset: int, data: bytes) -> None:
        if offset != self._size_bytes:
            raise InvalidInput(f"got a chunk at byte {offset}, expected byte {self._size_bytes}")
        if offset + len(data) > self._expected_bytes:
            raise InvalidInput(f"more than the {self._expected_bytes} bytes of the manifest arrived")
        with self._lock, disk_errors(self._path.parent):
            self._opened().write(data)
        self._hash.update(data)
        self._size_bytes += len(data)

    def seal(self, digest: str) -> None:
        if self._size_bytes != self._expected_bytes:
            raise InvalidInput(
                f"the upload ended after {self._size_bytes} bytes, but its manifest states {self._expected_bytes}"
            )
        actual = f"{_ALGORITHM}:{self._hash.hexdigest()}"
        if actual != digest:
            raise Corrupt(
                f"the upload hashes to {actual}, but its manifest states {digest}: it was corrupted in transit, send it again"
            )
        with self._lock, disk_errors(self._path.parent), self._opened() as file:
            _sync(file)

    def discard(self) -> None:
        with self._lock:
            self._is_discarded = True
            with suppress(OSError):  # flushing to a full disk fails, which does not matter here
                if self._file is not None:
                    self._file.close()
            self._path.unlink(missing_ok=True)

    def _opened(self) -> BinaryIO:
        if self._is_discarded:
            raise Unavailable("the sender of this upload disconnected")
        if self._file is None:
            self._file = self._path.open("xb")
        return self._file


def disk_errors(where: Path) -> AbstractContextManager[None]:
    """Turn a full disk into Exhausted, with a message that a person can act on."""
    return full_disk_as_exhausted(disk_full(where))


def disk_full(where: Path) -> str:
    return f"the disk of {where} is full; nothing was changed: free some space or move UPDRAFT_REGISTRY_DATA_DIR"


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
