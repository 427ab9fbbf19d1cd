"""Whether requests may come in, and how many are inside: starting, open, draining.

The listener is up before the model is loaded and stays up while requests drain, so that a probe and a client
hear why (503, with Retry-After) instead of a refused connection.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Generic, TypeVar

from updraft_chassis.errors import Exhausted, Unavailable

T = TypeVar("T")

_START_RETRY_S = 5.0


class ServingPhase(StrEnum):
    """Where a process is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class Readiness(Generic[T]):
    """Hands what serves (`T`) to each request while it is open, and knows when the last one has left."""

    def __init__(self, *, max_inside: int) -> None:
        self._max_inside = max_inside
        self._served: T | None = None
        self._is_draining = False
        self._num_inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def phase(self) -> ServingPhase:
        """Starting, ready or draining."""
        if self._is_draining:
            return ServingPhase.DRAINING
        return ServingPhase.STARTING if self._served is None else ServingPhase.READY

    @property
    def served(self) -> T | None:
        """What serves, once it does."""
        return self._served

    @property
    def num_inside(self) -> int:
        """Requests that were admitted and are not answered yet."""
        return self._num_inside

    def open(self, served: T) -> None:
        """Let requests in."""
        self._served = served

    def drain(self) -> None:
        """Let no more requests in, for good."""
        self._is_draining = True

    async def empty(self) -> None:
        """Wait until nobody is inside."""
        await self._empty.wait()

    @contextmanager
    def admitted(self) -> Iterator[T]:
        """Inside for the length of the block. Unavailable while starting or draining, Exhausted while it is full."""
        if self._is_draining:
            raise Unavailable("the server is shutting down: try another one")
        if self._served is None:
            raise Unavailable("the server is starting: the model is being loaded", _START_RETRY_S)
        if self._num_inside >= self._max_inside:
            raise Exhausted(f"{self._max_inside} requests are being read or answered, which is the most at once")
        self._num_inside += 1
        self._empty.clear()
        try:
            yield self._served
        finally:
            self._num_inside -= 1
            if not self._num_inside:
                self._empty.set()
