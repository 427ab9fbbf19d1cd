"""A bounded number of places, given in the order of arrival. A place is a future, so a caller can stop waiting.

asyncio.Semaphore was refused: a caller that interrupts its wait, to send a keepalive, would lose its position.
"""

import asyncio
from collections import deque


class FairQueue:
    """At most `limit` places are held at the same time. Used from one event loop."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def acquire(self) -> "asyncio.Future[None]":
        """Join the queue. The future completes when its place is free. Always release it, even if it never completed."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._grant()
        return place

    def release(self, place: "asyncio.Future[None]") -> None:
        """Free a place, or leave the queue."""
        if place in self._waiting:
            self._waiting.remove(place)
        else:
            self._free += 1
            self._grant()

    def _grant(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            self._waiting.popleft().set_result(None)
