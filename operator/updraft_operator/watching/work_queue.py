"""The queue of speculators to reconcile: each key at most once, however often it is added, with back-off after failures.

A key is never processed twice at the same time: if it is added while it is processed, it is queued again afterwards. A key that
is added only because measurements changed needs no plan; one other reason, and it needs one. Keys that need a plan come first:
a change that somebody waits for does not wait for the numbers of a thousand registries.
This is client-go's workqueue in sixty lines, because asyncio has none.
"""

import asyncio
import heapq
from collections.abc import Callable, Sequence
from itertools import count

from updraft_chassis.retry import Backoff
from updraft_operator.planning.objects import Key

_SPREAD_PER_S = 20.0
"""Plans of a resync per second, if there is time for so few. Each may read Secrets, with several requests to the API server."""


class WorkQueue:
    """A queue of distinct keys. Not thread-safe."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._ready: dict[Key, float] = {}
        """In order of arrival, with the time when the key was first added."""
        self._running: set[Key] = set()
        self._again: dict[Key, float] = {}
        self._later: list[tuple[float, int, Key, bool]] = []
        self._due: dict[tuple[Key, bool], float] = {}
        """By key, and whether a plan is due then."""
        self._needs_plan: dict[Key, None] = {}
        """In order of arrival, also those that are processed."""
        self._order = count()
        self._backoffs: dict[Key, Backoff] = {}
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, key: Key) -> None:
        self._needs_plan.setdefault(key)
        self.add_measured(key)

    def add_measured(self, key: Key) -> None:
        """Queue the key because of new measurements, or of a status that was written."""
        if key in self._running:
            self._again.setdefault(key, self._now())
        elif key not in self._ready:
            self._ready[key] = self._now()
            self._wake.set()

    def add_after(self, key: Key, delay_s: float, *, needs_plan: bool = True) -> None:
        """Queue the key after a delay, unless it is queued earlier; the earliest time counts."""
        at = self._now() + delay_s
        if at < self._due.get((key, needs_plan), float("inf")):
            self._due[key, needs_plan] = at
            heapq.heappush(self._later, (at, next(self._order), key, needs_plan))
            self._wake.set()

    def add_spread(self, keys: Sequence[Key], within_s: float) -> None:
        """Queue keys one after the other, all within `within_s` seconds, for plans that nobody waits for: a change never waits
        for those of a thousand others."""
        every_s = min(1.0 / _SPREAD_PER_S, within_s / max(1, len(keys)))
        for number, key in enumerate(keys):
            self.add_after(key, number * every_s)

    def retry(self, key: Key, at_least_s: float = 0.0) -> None:
        """Queue the key with a delay that grows until `forget`."""
        backoff = self._backoffs.setdefault(key, Backoff(initial_s=0.5, cap_s=60.0))
        self.add_after(key, max(at_least_s, next(backoff)))

    def forget(self, key: Key) -> None:
        """Reset the key's back-off after a success."""
        self._backoffs.pop(key, None)

    async def take(self) -> tuple[Key, float]:
        """The next key, and how long it waited in seconds: the first that needs a plan, or else the first. The caller must call
        `done`."""
        while True:
            self._move_due()
            if self._ready:
                key = next((key for key in self._needs_plan if key in self._ready), next(iter(self._ready)))
                since = self._ready.pop(key)
                self._running.add(key)
                return key, self._now() - since
            self._wake.clear()
            until_s = self._later[0][0] - self._now() if self._later else None
            try:
                async with asyncio.timeout(until_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def take_need_of_plan(self, key: Key) -> bool:
        """Whether the key was added for more than measurements, since this was last asked."""
        needs_plan = key in self._needs_plan
        self._needs_plan.pop(key, None)
        return needs_plan

    def done(self, key: Key) -> None:
        self._running.discard(key)
        if key in self._again:
            self._ready[key] = self._again.pop(key)
            self._wake.set()

    def _move_due(self) -> None:
        now = self._now()
        while self._later and self._later[0][0] <= now:
            at, _, key, needs_plan = heapq.heappop(self._later)
            if self._due.get((key, needs_plan)) == at:
                del self._due[key, needs_plan]
                (self.add if needs_plan else self.add_measured)(key)
