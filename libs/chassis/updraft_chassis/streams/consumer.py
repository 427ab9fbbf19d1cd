"""Reads a stream as one member of a consumer group; see `streams` for what is delivered and lost."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import redis.exceptions

from updraft_chassis.errors import Exhausted
from updraft_chassis.streams import FIELD, MAX_ENTRY_BYTES, Bound, Client, Entry, MeanSize, dead_key, redis_errors

logger = logging.getLogger(__name__)

DEAD_LETTERS_MAX_BYTES = 16 * 1024 * 1024
"""Dead letters are there for a person to inspect; a few are enough."""

# A read blocks for slices of this length, below the socket timeout, and looks for entries to reclaim in between.
_BLOCK_SLICE_MS = 1_000

# Redis's error codes for a missing consumer group; the second one if it is deleted while the reader waits.
_NO_GROUP = ("NOGROUP", "UNBLOCKED")

# Pending entries per XPENDING call.
_PAGE = 256


class Consumer:
    """One named member of a consumer group. Not for concurrent use: one task reads, handles and acknowledges.

    `claim_idle` is how long another consumer's entry must be idle before it is taken over. `read` renews the entries in hand
    (read but not settled), so `claim_idle` has to exceed the longest pause between two reads. `name` must be stable across
    restarts. With `retention_s`, dead letters disappear that long after the last one. Entries that `is_unwanted`, which runs
    in a thread, become none. `lost_total` counts entries that the size limit deleted before they were settled,
    `dead_letters_total` all dead letters, `lost_letters_total` those that a full Redis could not keep.
    """

    def __init__(  # noqa: PLR0913 - whose entries, and what becomes of those that nobody can handle
        self,
        client: Client,
        key: str,
        *,
        group: str,
        name: str,
        claim_idle: timedelta,
        max_deliveries: int = 5,
        retention_s: int | None = None,
        is_unwanted: Callable[[Entry], bool] = lambda _: False,
    ) -> None:
        self._client = client
        self._key = key
        self._dead_key = dead_key(key)
        self._dead_bound = Bound(DEAD_LETTERS_MAX_BYTES)
        self._sizes = MeanSize()
        self._group = group
        self._name = name
        self._claim_idle_ms = int(claim_idle.total_seconds() * 1000)
        self._max_deliveries = max_deliveries
        self._retention_s = retention_s
        self._is_unwanted = is_unwanted
        self.in_hand: set[str] = set()
        """Ids that were read and are not settled yet."""
        self._next_takeover_s = 0.0
        # Entries may be pending under our name without being in hand: after a crash, or after an interrupted read.
        self._may_own_more = True
        self.lost_total = 0
        self.dead_letters_total = 0
        self.lost_letters_total = 0

    async def open(self) -> None:
        """Create the group, starting at the stream's first entry, unless it exists.

        Exhausted if Redis is too full for that; the oldest entry then made room for the next try.
        """
        with redis_errors():
            await self._create_group()

    async def read(self, *, count: int, block: timedelta) -> list[Entry]:
        """Return up to `count` entries, unsettled ones first, then new ones; an empty list after `block`.

        Unavailable if Redis is unreachable. Neither that nor a cancellation loses an entry.
        """
        deadline_s = asyncio.get_running_loop().time() + block.total_seconds()
        with redis_errors():
            while True:
                left_ms = int((deadline_s - asyncio.get_running_loop().time()) * 1000)
                block_ms = min(left_ms, _BLOCK_SLICE_MS)
                try:
                    entries = await self._reclaim(count) or await self._new(count, block_ms)
                except redis.exceptions.ResponseError as error:
                    if not str(error).startswith(_NO_GROUP):
                        raise
                    logger.warning("Redis lost the consumer group; creating it again", extra={"stream": self._key})
                    await self._create_group()
                    continue
                if entries or left_ms <= _BLOCK_SLICE_MS:
                    for entry in entries:
                        self._sizes.add(len(entry.data))
                    return entries

    async def fullness(self, max_bytes: int) -> float:
        """The share of a stream of `max_bytes` that waits, by the mean size of recent entries: without those in hand. It may
        exceed 1. Unlike the other methods, this one may be called at any time. Unavailable if Redis is unreachable.
        """
        with redis_errors():
            length = await self._client.xlen(self._key)
        return max(0, int(length) - len(self.in_hand)) * self._sizes.mean_bytes / max_bytes

    async def ack(self, ids: Iterable[str]) -> None:
        """Settle entries whose effect is durable: remove them from the group and from the stream."""
        ids = list(ids)
        if not ids:
            return
        with redis_errors():
            # If interrupted between the two, the entry is pending without data; the next run settles it and counts it as lost.
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.xdel(self._key, *ids)
                pipe.xack(self._key, self._group, *ids)
                await pipe.execute()
        self.in_hand.difference_update(ids)

    async def dead_letter(self, entry: Entry, reason: str) -> None:
        """Settle an entry that can never be handled; `<key>:dead` keeps it for a while, with the reason.

        If Redis is too full to keep it, the entry is still settled, counted and logged: it must not block other entries, and
        settling is what empties a full Redis. If interrupted in between, the letter is kept twice.
        """
        if await asyncio.to_thread(self._is_unwanted, entry):
            await self.ack([entry.id])
            return
        is_kept = await self._keep_letter(entry, reason)
        await self.ack([entry.id])
        self.dead_letters_total += 1
        facts = {"stream": self._key, "id": entry.id, "deliveries": entry.deliveries, "reason": reason}
        if is_kept:
            logger.warning("Dead letter", extra=facts)
        else:
            self.lost_letters_total += 1
            logger.error("Dead letter, lost: Redis is full", extra=facts)

    async def _keep_letter(self, entry: Entry, reason: str) -> bool:
        data = entry.data[:MAX_ENTRY_BYTES]  # what is longer was written by somebody who wants to fill Redis
        letter: dict[Any, Any] = {FIELD: data, "reason": reason, "id": entry.id, "deliveries": entry.deliveries}
        maxlen = self._dead_bound.entries(len(data))
        with redis_errors():
            try:
                await self._client.xadd(self._dead_key, letter, maxlen=maxlen, approximate=True)
            except redis.exceptions.OutOfMemoryError:
                return False
            if self._retention_s is not None:
                await self._limit_letters(self._retention_s)
        return True

    async def _limit_letters(self, retention_s: int) -> None:
        """The letter is kept, so it must not be kept again because a user may not set its age."""
        try:
            await self._client.pexpire(self._dead_key, 1000 * retention_s)
        except redis.exceptions.NoPermissionError as error:
            facts = {"stream": self._dead_key, "error": str(error)}
            logger.warning("Redis refuses to limit dead letters by age; they may stay longer", extra=facts)

    async def _create_group(self) -> None:
        try:
            await self._client.xgroup_create(self._key, self._group, id="0", mkstream=True)
        except redis.exceptions.ResponseError as error:
            if isinstance(error, redis.exceptions.OutOfMemoryError):
                await self._create_group_when_full()
            elif not str(error).startswith("BUSYGROUP"):
                raise

    async def _create_group_when_full(self) -> None:
        """A full Redis refuses to create a group, also one that exists, but without its group a stream never empties."""
        groups: Any = await self._client.xinfo_groups(self._key) if await self._client.exists(self._key) else []
        if self._group.encode() in {group["name"] for group in groups}:
            return
        num_entries = await self._client.xlen(self._key)
        if not num_entries:
            raise Exhausted("Redis has reached its maxmemory")
        num_deleted = await self._client.xtrim(self._key, maxlen=num_entries - 1, approximate=False)
        self.lost_total += num_deleted
        facts = {"stream": self._key, "deleted": num_deleted}
        logger.warning("Redis is full: deleted the oldest trace to have room for the consumer group", extra=facts)
        await self._client.xgroup_create(self._key, self._group, id="0", mkstream=True)

    async def _reclaim(self, count: int) -> list[Entry]:
        if self._may_own_more:
            if entries := await self._claim(count, min_idle_ms=0, consumername=self._name):
                return entries
            self._may_own_more = False
        now_s = asyncio.get_running_loop().time()
        if now_s < self._next_takeover_s:
            return []
        await self._renew()
        with self._interrupted_owns_more():
            entries = await self._claim(count, min_idle_ms=self._claim_idle_ms, idle=self._claim_idle_ms)
        if not entries:  # otherwise there may be more
            self._next_takeover_s = now_s + self._claim_idle_ms / 4000
        return entries

    async def _renew(self) -> None:
        """Reset the idle time of the entries in hand; JUSTID does not count as a delivery."""
        if self.in_hand:
            await self._client.xclaim(self._key, self._group, self._name, 0, [*self.in_hand], justid=True)

    async def _claim(self, count: int, *, min_idle_ms: int, **which: Any) -> list[Entry]:
        """Claim pending entries and return them, after settling those that are lost or were delivered too often."""
        while deliveries := await self._pending(count, **which):
            # The minimum idle time again: if two consumers list the same entry, only one gets it.
            reply: Any = await self._client.xclaim(self._key, self._group, self._name, min_idle_ms, [*deliveries])
            claimed = [self._entry(row, deliveries) for row in reply if row[0] is not None]
            await self._settle_lost(deliveries.keys() - {entry.id for entry in claimed})
            entries = [entry for entry in claimed if entry.deliveries <= self._max_deliveries]
            for entry in claimed:
                if entry.deliveries > self._max_deliveries:
                    await self.dead_letter(entry, f"not handled in {self._max_deliveries} deliveries")
            if entries:
                self.in_hand.update(entry.id for entry in entries)
                return entries
        return []

    async def _pending(self, count: int, **which: Any) -> dict[str, int]:
        """Up to `count` pending entries that are not in hand, with their number of deliveries so far."""
        start = "-"
        while True:
            rows: Any = await self._client.xpending_range(
                self._key, self._group, min=start, max="+", count=_PAGE, **which
            )
            deliveries = {row["message_id"].decode(): int(row["times_delivered"]) for row in rows}
            wanted = [id_ for id_ in deliveries if id_ not in self.in_hand]
            if wanted or len(rows) < _PAGE:
                return {id_: deliveries[id_] for id_ in wanted[:count]}
            start = f"({[*deliveries][-1]}"

    async def _settle_lost(self, ids: Iterable[str]) -> None:
        """Acknowledge those of `ids` that the size limit deleted while they were pending."""
        for id_ in ids:
            if not await self._client.xrange(self._key, id_, id_):
                await self._client.xack(self._key, self._group, id_)
                self.lost_total += 1

    async def _new(self, count: int, block_ms: int) -> list[Entry]:
        with self._interrupted_owns_more():
            reply: Any = await self._client.xreadgroup(
                self._group,
                self._name,
                {self._key: ">"},
                count=count,
                block=block_ms if block_ms > 0 else None,  # 0 would block without a limit
            )
        rows = reply[0][1] if reply else []
        # A group that was lost and created again redelivers everything, including entries that are still in hand.
        entries = [entry for row in rows if (entry := self._entry(row, {})).id not in self.in_hand]
        self.in_hand.update(entry.id for entry in entries)
        return entries

    @contextmanager
    def _interrupted_owns_more(self) -> Iterator[None]:
        """If a command that assigns entries to us is interrupted, the next read looks for them."""
        self._may_own_more = True
        yield
        self._may_own_more = False

    @staticmethod
    def _entry(row: tuple[bytes, dict[bytes, bytes]], deliveries: dict[str, int]) -> Entry:
        return Entry.of(row, deliveries=deliveries.get(row[0].decode(), 0) + 1)
