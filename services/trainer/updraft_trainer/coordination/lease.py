"""A lease in Redis: of several processes that could do some work, one does it, and another one goes on if it dies.

The holder renews the lease; if it falls silent, the lease runs out and whoever asks next has it. A holder that was paused
meanwhile knows by its own clock that it may not act any more: `check` before an effect that two holders must not have. Redis
away means the same. Rejected: a lock on a file, which two machines do not share; the registry as the place, because it is away
more often than Redis where training could go on.
"""

import logging
from collections.abc import Callable

from updraft_chassis.clock import Clock
from updraft_chassis.errors import Conflict, Unavailable, UpdraftError
from updraft_chassis.lifecycle import Stop
from updraft_chassis.streams import Client, redis_errors

logger = logging.getLogger(__name__)

RENEWALS = 6
"""Per lease, so that a few may fail."""

# PEXPIRE, because a Redis that is full rejects SET.
_TAKE = """
local holder = redis.call('GET', KEYS[1])
if holder == ARGV[1] then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
elseif not holder then
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
    holder = ARGV[1]
end
return holder
"""

_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class Lease:
    """The lease `key` for `holder`, who has it for `duration_s` after each renewal. `on_change` is told whether it has."""

    def __init__(
        self,
        client: Client,
        key: str,
        holder: str,
        *,
        duration_s: float,
        clock: Clock,
        on_change: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._client = client
        self._key = key
        self._holder = holder
        self._duration_s = duration_s
        self._clock = clock
        self._on_change = on_change
        self._until_s = float("-inf")

    @property
    def is_held(self) -> bool:
        """By this process's clock, which never says so longer than Redis does."""
        return self._clock.monotonic() < self._until_s

    def check(self) -> None:
        """Unavailable if the lease is not held."""
        if not self.is_held:
            raise Unavailable(
                f"the lease of {self._holder} has run out, because Redis was away or this process was paused"
            )

    async def take(self) -> str:
        """Take or renew it if nobody else has it; return who has it. Unavailable if Redis is unreachable."""
        asked_s = self._clock.monotonic()
        with redis_errors():
            holder = await self._client.eval(_TAKE, 1, self._key, self._holder, int(1000 * self._duration_s))
        name = str(holder, "utf-8")
        self._until_s = asked_s + self._duration_s if name == self._holder else float("-inf")
        self._on_change(self.is_held)
        return name

    async def wait(self, stop: Stop) -> None:
        """Return when it is held, when Redis is unreachable, so that nobody knows, or after `stop`."""
        seen = self._holder
        while not stop.requested:
            try:
                holder = await self.take()
            except UpdraftError:
                return
            if holder == self._holder:
                return
            if holder != seen:
                facts = {"holder": holder, "waits_for_at_most_s": self._duration_s}
                logger.warning("%s waits until %s ends, which does the same work", self._holder, holder, extra=facts)
                seen = holder
            await stop.wait(self._duration_s / RENEWALS)

    async def hold(self, stop: Stop) -> None:
        """Renew it until `stop`. Conflict if another one has it."""
        while not await stop.wait(self._duration_s / RENEWALS):
            try:
                holder = await self.take()
            except UpdraftError:
                self._on_change(self.is_held)
                continue
            if holder != self._holder:
                raise Conflict(f"{holder} does the work of {self._holder} now, whose lease had run out")

    async def release(self) -> None:
        """Let the next one have it at once. Unavailable if Redis is unreachable."""
        self._until_s = float("-inf")
        with redis_errors():
            await self._client.eval(_RELEASE, 1, self._key, self._holder)
