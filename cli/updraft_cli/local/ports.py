"""TCP ports of this machine: requested or free ones, checked before anything starts."""

import time
from contextlib import suppress

import psutil

from updraft_chassis.errors import Conflict
from updraft_chassis.ports import free_port, is_free

HOST = "127.0.0.1"

_ENDING_S = 2.0
"""Time for a listener that is about to end, e.g. a child of a supervisor that was killed."""


class Ports:
    def __init__(self, *, ending_s: float = _ENDING_S) -> None:
        self._given: set[int] = set()
        self._ending_s = ending_s

    def claim(self, port: int, *, option: str) -> int:
        """Return `port` (0: a free one); Conflict names its owner and `option` if it is taken."""
        if port == 0:
            return self._free()
        if port in self._given or not _becomes_free(port, self._ending_s):
            owner = "another part of updraft" if port in self._given else _owner(port)
            raise Conflict(
                f"port {port} on {HOST} is taken by {owner}; choose another with {option} (0 takes a free one)"
            )
        self._given.add(port)
        return port

    def prefer(self, port: int) -> int:
        """Return `port`, or a free one if it is taken: for ports that nobody types."""
        if port in self._given or not is_free(port):
            return self._free()
        self._given.add(port)
        return port

    def _free(self) -> int:
        while (port := free_port()) in self._given:
            pass
        self._given.add(port)
        return port


def _becomes_free(port: int, within_s: float) -> bool:
    end_s = time.monotonic() + within_s
    while not is_free(port):
        if time.monotonic() > end_s:
            return False
        time.sleep(0.05)
    return True


def _owner(port: int) -> str:
    # Sockets of other users, and processes that end meanwhile, cannot be looked up.
    with suppress(psutil.Error):
        for connection in psutil.net_connections("inet"):
            if connection.laddr and connection.laddr.port == port and connection.pid and not connection.raddr:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another program"
