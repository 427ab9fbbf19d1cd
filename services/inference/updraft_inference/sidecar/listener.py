"""The agent's Unix socket. One agent at a time listens there; a locked file next to it excludes others.

The kernel releases the lock of an agent that dies, whose socket is a file that the next agent replaces. Without the lock, two
agents that start at once could both replace it, and the plugin would find only the second.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from updraft_chassis.errors import InvalidInput

_MAX_PATH = 107
"""Length limit of a Unix socket path on Linux, in bytes."""

_MODE = 0o660
"""The server may run as another user of the volume's group, and so may the next agent."""


@contextmanager
def listening_at(path: Path, *, setting: str) -> Iterator[socket.socket]:
    """A listening socket for the duration of the block. Raises InvalidInput, with the setting of the path, if there can be
    none, or somebody listens there."""
    if len(str(path).encode()) > _MAX_PATH:
        raise InvalidInput(f"{path} is too long for a Unix socket ({_MAX_PATH} bytes): set {setting}")
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(path))
            listener = stack.enter_context(_bound(path))
        except OSError as error:
            if isinstance(error, BlockingIOError) or error.errno == errno.EADDRINUSE:
                message = f"cannot listen at {path}: another program listens there; each agent needs its own {setting}"
            else:
                message = f"cannot listen at {path}: {error.strerror}; set {setting}"
            raise InvalidInput(message) from error
        yield listener


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Exclude other agents. Raises BlockingIOError if one is there. The file is never removed: otherwise one agent could lock
    the old file and another one a new file, and both would listen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDONLY | os.O_CREAT, _MODE)
    try:
        with suppress(PermissionError):  # it is another user's, who has set the mode
            os.fchmod(lock, _MODE)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


@contextmanager
def _bound(path: Path) -> Iterator[socket.socket]:
    """A listening socket in place of a file that was left over."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        if path.is_socket() and not _answers(path):  # else bind refuses it
            path.unlink()
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)  # noqa: FBT003 - the standard library's
        path.chmod(_MODE)
        ours = path.stat().st_ino
        try:
            yield listener
        finally:
            with suppress(FileNotFoundError):
                if path.stat().st_ino == ours:  # else somebody replaced it
                    path.unlink()


def _answers(path: Path) -> bool:
    """Whether somebody listens at the socket, also one too busy to accept. Raises OSError if that cannot be found out."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # noqa: FBT003 - the standard library's
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:  # its queue is full
            return True
        return True
