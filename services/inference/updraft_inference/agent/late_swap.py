"""A swap that does not end: which one, for how long, and what a person can do.

It is not cut off. Several ranks of a server wait in a swap for each other, and nothing but a restart helps if one hangs; if it
was only slow, the swap ends after all.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from updraft_chassis.clock import Clock
from updraft_chassis.errors import Unavailable

logger = logging.getLogger(__name__)


class LateSwap:
    """`on_change` is called whenever `reason` has changed. While not `is_there`, the server restarts, and is not late."""

    def __init__(self, clock: Clock, *, is_there: Callable[[], bool], on_change: Callable[[], None]) -> None:
        self._clock = clock
        self._is_there = is_there
        self._on_change = on_change
        self._begun = (0, 0.0)
        """The version of the swap that is running or late, and when it began on the monotonic clock."""
        self._timer: asyncio.TimerHandle | None = None
        """Looks at it again."""
        self.reason = ""
        """Which swap has not ended, for how long, and what to do; empty if none is late."""
        self.after_s = 120.0
        """After how long a swap is late. It is reported again whenever this time has doubled."""

    @asynccontextmanager
    async def watching(self, version: int) -> AsyncIterator[None]:
        """Report the swap within the block if it does not end. If it is repeated because it was Unavailable, it is still late,
        until it succeeds, the draft is refused, or the server goes away."""
        self._forget(is_over=False)
        if not self.reason:
            self._begun = version, self._clock.monotonic()
        self._wait()
        is_over = True
        try:
            yield
        except Unavailable:
            is_over = False
            raise
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._forget(is_over=is_over)

    def _forget(self, *, is_over: bool) -> None:
        if self.reason and (is_over or not self._is_there()):
            self.reason = ""
            self._on_change()

    def _wait(self) -> None:
        late_s = self._clock.monotonic() - self._begun[1]
        self._timer = asyncio.get_running_loop().call_later(max(self.after_s, late_s), self._look)

    def _look(self) -> None:
        """Report the swap if it is late, and look again later."""
        if not self._is_there():
            self._begun = self._begun[0], self._clock.monotonic()
        version, began_s = self._begun
        late_s = self._clock.monotonic() - began_s
        if late_s >= self.after_s:
            self.reason = (
                f"the swap to version {version} has not ended after {late_s:.0f} s: if the server also finishes no requests,"
                " it hangs and needs a restart"
            )
            logger.error("A swap does not end", extra={"version": version, "reason": self.reason})
            self._on_change()
        self._wait()
