"""Errors that a caller can act on. Any other exception is a bug and is not converted.

    UpdraftError            INTERNAL             failure inside Updraft, described in one sentence
    +-- NotFound            NOT_FOUND            the version, speculator or file does not exist
    +-- Conflict            FAILED_PRECONDITION  the request is valid, but the current state does not allow it
    +-- InvalidInput        INVALID_ARGUMENT     the caller must change the request; a retry cannot help
    +-- Unauthenticated     UNAUTHENTICATED      the call has no token, or an unknown one; a person has to act
    +-- Forbidden           PERMISSION_DENIED    the caller's role does not allow the call; a person has to act
    +-- Unavailable         UNAVAILABLE          a peer is unreachable or overloaded: retry (after `retry_after_s`)
    +-- Exhausted           RESOURCE_EXHAUSTED   a limit is reached: disk, memory, quota or message size
    +-- Corrupt             DATA_LOSS            bytes do not match their digest: discard them and fetch again

`status` names a gRPC status: `rpc.ErrorsToStatus` maps the tree to statuses and `rpc.errors` maps statuses back.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class UpdraftError(Exception):
    """The message is one sentence: what failed, for which object, and what was expected."""

    status: ClassVar[str] = "INTERNAL"


class NotFound(UpdraftError):  # noqa: N818 - the tree reads as conditions, like the gRPC statuses it maps to
    status: ClassVar[str] = "NOT_FOUND"


class Conflict(UpdraftError):  # noqa: N818 - see NotFound
    status: ClassVar[str] = "FAILED_PRECONDITION"


class InvalidInput(UpdraftError):  # noqa: N818 - see NotFound
    status: ClassVar[str] = "INVALID_ARGUMENT"


class Unauthenticated(UpdraftError):  # noqa: N818 - see NotFound
    status: ClassVar[str] = "UNAUTHENTICATED"


class Forbidden(UpdraftError):  # noqa: N818 - see NotFound
    status: ClassVar[str] = "PERMISSION_DENIED"


class Unavailable(UpdraftError):  # noqa: N818 - see NotFound
    status: ClassVar[str] = "UNAVAILABLE"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Exhausted(UpdraftError):  # noqa: N818 - see NotFound
    status: ClassVar[str] = "RESOURCE_EXHAUSTED"


class Corrupt(UpdraftError):  # noqa: N818 - see NotFound
    status: ClassVar[str] = "DATA_LOSS"


@contextmanager
def full_disk_as_exhausted(message: str) -> Iterator[None]:
    """Raise Exhausted with this message where a disk or a quota is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise Exhausted(message) from error
