"""Interface of a store. Synchronous: every call comes from a worker thread.

A remote store may raise Unavailable from any call. Nothing is lost then, and the call can be retried.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol


class Upload(Protocol):
    """An incoming file, invisible until it is committed."""

    @property
    def path(self) -> Path:
        """Where the bytes are now, on a local disk."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Append; InvalidInput unless it starts where the last write ended and stays within the announced size."""
        ...

    def seal(self, digest: str) -> None:
        """Make the bytes durable.

        InvalidInput if they are fewer than announced, Corrupt if their digest differs.
        """
        ...

    def discard(self) -> None:
        """Delete the file. Has no effect after a commit, or the second time."""
        ...


class Store(Protocol):
    """Blobs by digest ("sha256:<hex>"), and small documents. Each appears whole or not at all."""

    def clean(self) -> int:
        """Delete what interrupted uploads left; return how many."""
        ...

    @property
    def shares_disk(self) -> bool:
        """Whether blobs are on the disk that uploads need, so that deleting one makes room."""
        ...

    def free_bytes(self) -> int:
        """Room for uploads."""
        ...

    def volume_bytes(self) -> int:
        """Size of the volume of the blobs; 0 if they have none of a fixed size."""
        ...

    def begin(self, size_bytes: int) -> Upload:
        """Start an upload of exactly this size; Exhausted when there is no room for it. Nothing is written yet."""
        ...

    def prepare(self, upload: Upload, digest: str) -> None:
        """Do the slow part of a commit, on any thread. `digests` does not change yet."""
        ...

    def commit(self, upload: Upload, digest: str) -> None:
        """Make a sealed and prepared upload visible as the blob `digest`."""
        ...

    def open(self, digest: str) -> BinaryIO:
        """Open a blob; NotFound if there is none. This may have to download it first."""
        ...

    def link(self, digest: str) -> str | None:
        """A temporary URL of a blob, if readers should be redirected there."""
        ...

    def digests(self) -> frozenset[str]:
        """All blobs."""
        ...

    def delete(self, digest: str) -> None:
        """Delete a blob, if it exists. Open files stay readable."""
        ...

    def documents(self) -> Iterable[tuple[str, int]]:
        """All documents, by speculator and version."""
        ...

    def read_document(self, speculator: str, number: int) -> bytes:
        """Read one document; empty if there is none."""
        ...

    def write_document(self, speculator: str, number: int, content: bytes) -> None:
        """Write or replace one document."""
        ...

    def delete_document(self, speculator: str, number: int) -> None:
        """Delete one document, if it exists."""
        ...
