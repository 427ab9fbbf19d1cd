"""Whether requests are accepted, and how many are in progress: starting, ready, draining.

The port is open before the model is loaded and stays open while requests drain, so that probes and clients get a 503
with Retry-After instead of a refused connection.
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
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class Readiness(Generic[T]):
    """Gives each request what it is served with (`T`) while the process is ready, and counts requests in progress."""

    def __init__(self, *, max_inside: int) -> None:
        self._max_inside = max_inside
        self.served: T | None = None
        """None until the process is ready for the first time."""
        self._is_draining = False
        self.num_inside = 0
        """Admitted requests that are not answered yet."""
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def phase(self) -> ServingPhase:
        if self._is_draining:
            return ServingPhase.DRAINING
        return ServingPhase.STARTING if self.served is None else ServingPhase.READY

    def open(self, served: T) -> None:
        self.served = served

    def drain(self) -> None:
        """Accept no more requests, permanently."""
        self._is_draining = True

    async def empty(self) -> None:
        await self._empty.wait()

    @contextmanager
    def admitted(self) -> Iterator[T]:
        """Count the request for the duration of the block. Raises Unavailable while starting or draining, Exhausted
        while full."""
        if self._is_draining:
            raise Unavailable("the server is shutting down; try another one")
        if self.served is None:
            raise Unavailable("the server is starting and still loading the model", _START_RETRY_S)
        if self.num_inside >= self._max_inside:
            raise Exhausted(f"the server already has its maximum of {self._max_inside} requests in progress")
        self.num_inside += 1
        self._empty.clear()
        try:
            yield self.served
        finally:
            self.num_inside -= 1
            if not self.num_inside:
                self._empty.set()
