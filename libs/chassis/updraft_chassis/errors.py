"""The errors that a caller can act on; everything else is a bug and stays what it is.

    UpdraftError            INTERNAL             our own failure, with a sentence
    +-- NotFound            NOT_FOUND            no such version, speculator, file
    +-- Conflict            FAILED_PRECONDITION  the state does not allow it (now)
    +-- InvalidInput        INVALID_ARGUMENT     the caller must change what it sends
    +-- Unauthenticated     UNAUTHENTICATED      the caller has no token, or one that is not known
    +-- Forbidden           PERMISSION_DENIED    the caller is known, and its role does not allow this
    +-- Unavailable         UNAVAILABLE          a peer is away: try again (after `retry_after_s`)
    +-- Exhausted           RESOURCE_EXHAUSTED   disk, memory, quota or message limit
    +-- Corrupt             DATA_LOSS            bytes do not match their digest; never retried as they are

`status` names a gRPC status: `rpc.ErrorsToStatus` maps the whole tree, and `rpc.errors` maps it back.
"""

from typing import ClassVar


class UpdraftError(Exception):
    """A failure told in one sentence: what, which, and what was expected."""

    status: ClassVar[str] = "INTERNAL"


class NotFound(UpdraftError):  # noqa: N818 - the tree reads as conditions, like the gRPC statuses it maps to
    """What was asked for does not exist."""

    status: ClassVar[str] = "NOT_FOUND"


class Conflict(UpdraftError):  # noqa: N818 - see NotFound
    """The request is well formed, but the present state does not allow it."""

    status: ClassVar[str] = "FAILED_PRECONDITION"


class InvalidInput(UpdraftError):  # noqa: N818 - see NotFound
    """The caller has to send something else; trying again cannot help."""

    status: ClassVar[str] = "INVALID_ARGUMENT"


class Unauthenticated(UpdraftError):  # noqa: N818 - see NotFound
    """The peer does not know who is calling: no token, or one that is not known there. A person has to act."""

    status: ClassVar[str] = "UNAUTHENTICATED"


class Forbidden(UpdraftError):  # noqa: N818 - see NotFound
    """The peer knows the caller, whose role does not allow the call. A person has to act."""

    status: ClassVar[str] = "PERMISSION_DENIED"


class Unavailable(UpdraftError):  # noqa: N818 - see NotFound
    """A peer is away or overloaded; try again later, after `retry_after_s` seconds if it said so."""

    status: ClassVar[str] = "UNAVAILABLE"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Exhausted(UpdraftError):  # noqa: N818 - see NotFound
    """A limit is reached: disk, memory, quota, message size."""

    status: ClassVar[str] = "RESOURCE_EXHAUSTED"


class Corrupt(UpdraftError):  # noqa: N818 - see NotFound
    """Bytes do not match their digest. Never retried as they are: throw them away and fetch anew."""

    status: ClassVar[str] = "DATA_LOSS"
