"""What the archive needs of a place for blobs. Synchronous: every call is made from a worker thread.

Any call may raise Unavailable where the place is far away; nothing is lost then, and trying again is right.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol


class Upload(Protocol):
    """A file on its way in: nobody sees it before it is committed."""

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
        """Forget the file; nothing happens once it is committed, or the second time."""
        ...


class Store(Protocol):
    """Blobs by digest ("sha256:<hex>"), and one small document per version.

    Each appears whole or not at all.
    """

    def clean(self) -> int:
        """Delete what interrupted uploads left; return how many."""
        ...

    def begin(self, size_bytes: int) -> Upload:
        """Start an upload of exactly this size; Exhausted when there is no room for it. Nothing is written yet."""
        ...

    def prepare(self, upload: Upload, digest: str) -> None:
        """Do what may take long of a commit; from any thread, and `digests` stays what it was."""
        ...

    def commit(self, upload: Upload, digest: str) -> None:
        """Let a sealed and prepared upload appear as the blob `digest`."""
        ...

    def open(self, digest: str) -> BinaryIO:
        """Open a blob on a local disk; NotFound if there is none. Takes as long as bringing it there, if it is not."""
        ...

    def link(self, digest: str) -> str | None:
        """An address where anyone may GET a blob for a while, if readers are to be sent there."""
        ...

    def digests(self) -> frozenset[str]:
        """All blobs."""
        ...

    def delete(self, digest: str) -> None:
        """Delete a blob; deleting what is not there is no error. Who reads it now reads it to its end."""
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
        """Delete one document; deleting what is not there is no error."""
        ...
