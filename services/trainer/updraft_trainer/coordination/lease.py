"""A lease in Redis: of several processes that could do some work, one does it, and another one goes on if it dies.

The holder renews the lease. If it stops renewing, the lease runs out, and the next process that asks for it gets it. A holder
that was paused meanwhile knows by its own clock that it may not act any more: `check` before an effect that two holders must
not have. The same holds while Redis is away. Rejected: a lock on a file, which two machines do not share; the registry as the
place, because it is away more often than Redis where training could go on; a script in Redis, because a user that may run one
can stop a Redis that others share; MULTI, in which a full Redis rejects every command.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from updraft_chassis.clock import Clock
from updraft_chassis.errors import Conflict, Unavailable, UpdraftError
from updraft_chassis.lifecycle import Stop
from updraft_chassis.streams import Client, redis_errors

logger = logging.getLogger(__name__)

RENEWALS = 6
"""Per lease, so that a few may fail."""

_RELEASE_S = 3.0
"""A lease is released only with more time left than a command may take; otherwise it runs out by itself."""


class Lease:
    """The lease `key` for a holder, who has it for `duration_s` after each renewal.

    `holder_id` has no space; two processes with the same one are the same holder. `holder` is its name in messages. `on_change`
    is told after each attempt whether this process has the lease.
    """

    def __init__(  # noqa: PLR0913 - a holder has an id and a name
        self,
        client: Client,
        key: str,
        holder: str,
        *,
        holder_id: str,
        duration_s: float,
        clock: Clock,
        on_change: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._client = client
        self._key = key
        self._holder = holder
        self._holder_id = holder_id
        self._duration_s = duration_s
        self._clock = clock
        self._on_change = on_change
        self._until_s = float("-inf")
        self._error: UpdraftError | None = None
        """Why the last attempt failed."""
        self.was_taken = False
        """Whether this process has ever had it, so that no other holder was there."""

    @property
    def is_held(self) -> bool:
        """By this process's clock, which never says so longer than Redis does."""
        return self._clock.monotonic() < self._until_s

    def check(self) -> None:
        """Unavailable if the lease is not held."""
        if not self.is_held:
            reason = "this process was paused" if self._error is None else f"it could not be renewed: {self._error}"
            raise Unavailable(f"the lease of {self._holder} has run out, because {reason}")

    async def take(self) -> str:
        """Take or renew it if nobody else has it; return who has it. UpdraftError if Redis does not say."""
        asked_s = self._clock.monotonic()
        try:
            with redis_errors():
                other = await self._taken()
        except UpdraftError as error:
            self._failed(error)
            raise
        if self._error is not None:
            logger.info("Redis answers again about the lease of %s", self._holder)
        self._error = None
        self._until_s = float("-inf") if other else asked_s + self._duration_s
        self.was_taken = self.was_taken or not other
        self._on_change(self.is_held)
        return other or self._holder

    async def _taken(self) -> str:
        """Take or renew it; return the name of the other holder, or nothing. Unavailable if it ran out in between."""
        milliseconds = int(1000 * self._duration_s)
        value = await self._value()
        if not value and await self._client.set(
            self._key, f"{self._holder_id} {self._holder}", px=milliseconds, nx=True
        ):
            return ""
        if self._is_own(value):
            await self._client.pexpire(self._key, milliseconds)
        elif value:
            return _name(value)
        value = await self._value()  # only now is it sure whose lease was renewed
        if not value:
            raise Unavailable("the lease ran out while it was being renewed")
        return "" if self._is_own(value) else _name(value)

    async def _value(self) -> str:
        """The holder's id, a space and its name; empty if nobody holds it."""
        value: Any = await self._client.get(self._key)  # bytes, because the client does not decode
        return str(value or b"", "utf-8")

    def _is_own(self, value: str) -> bool:
        return value.startswith(f"{self._holder_id} ")

    def _failed(self, error: UpdraftError) -> None:
        """Log the first of several failures."""
        if self._error is None:
            logger.warning("Cannot take or renew the lease of %s: %s", self._holder, error)
        self._error = error
        self._on_change(self.is_held)

    async def wait(self, stop: Stop) -> None:
        """Return when it is held or after `stop`; also if Redis is unavailable and has named no other holder.

        Once another holder was seen, an outage of Redis says nothing about it, so the wait goes on. It does too after any other
        error, such as that of a full Redis.
        """
        other = ""
        while not stop.requested:
            try:
                holder = await self.take()
            except UpdraftError as error:
                if isinstance(error, Unavailable) and not other:
                    return
            else:
                if holder == self._holder:
                    return
                if holder != other:
                    logger.warning("%s waits until %s ends, which does the same work", self._holder, holder)
                    other = holder
            await stop.wait(self._duration_s / RENEWALS)

    async def hold(self, stop: Stop) -> None:
        """Renew it until `stop`. If another one has it, request the stop and raise Conflict: after a pause, timeouts and the
        cancellation come at once to the other tasks, and a task may take the one for the other."""
        while not await stop.wait(self._duration_s / RENEWALS):
            try:
                holder = await self.take()
            except UpdraftError:
                continue  # it was logged
            if holder != self._holder:
                stop.request()
                raise Conflict(f"{holder} does the work of {self._holder} now, whose lease had run out")

    async def release(self) -> None:
        """Let the next one have it at once. Unavailable if Redis is unreachable or does not answer as long as it is held."""
        left_s, self._until_s = self._until_s - self._clock.monotonic(), float("-inf")
        if left_s > _RELEASE_S:
            try:
                with redis_errors():
                    async with asyncio.timeout(left_s):
                        await self._client.unlink(self._key)
            except TimeoutError:
                raise Unavailable(f"the lease of {self._holder} ran out before Redis deleted it") from None


def _name(value: str) -> str:
    return value.partition(" ")[2]
