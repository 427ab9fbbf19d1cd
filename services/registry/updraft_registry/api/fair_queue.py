"""First come, first served, and at most so many at once. A place in the queue is a future, so waiting can be interrupted.

Refused: asyncio.Semaphore, where whoever looks up from waiting (to say that it still waits) goes to the end of the queue.
"""

import asyncio
from collections import deque


class Turns:
    """At most `limit` turns are taken at once. Used from one event loop."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def num_waiting(self) -> int:
        """How many are in the queue."""
        return len(self._queue)

    def take(self) -> "asyncio.Future[None]":
        """Queue up; the turn has come when the future is done. Give it back whether or not it came."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        self._call()
        return turn

    def give_back(self, turn: "asyncio.Future[None]") -> None:
        """Let the next one come; or leave the queue."""
        if turn in self._queue:
            self._queue.remove(turn)
        else:
            self._free += 1
            self._call()

    def _call(self) -> None:
        while self._free and self._queue:
            self._free -= 1
            self._queue.popleft().set_result(None)
