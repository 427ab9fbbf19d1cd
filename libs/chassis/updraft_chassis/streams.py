"""At-least-once delivery over one Redis stream, bounded in bytes.

An entry stays pending until `ack`, so a crash redelivers it; a reader must be idempotent (ours dedupes by trace id).
What could not be handled `max_deliveries` times goes to `<key>:dead` instead of killing the consumer for ever. Only
the bound loses entries: the oldest go first, and `append` says how many. Refused: XAUTOCLAIM (it cannot leave out
what is in hand, and it counts deliveries that never happened), blocking a producer on a full stream (serving never
waits for learning), MULTI (a full Redis refuses every command in one, and could then never be emptied).
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from updraft_chassis.errors import Exhausted, InvalidInput, Unavailable, UpdraftError

logger = logging.getLogger(__name__)

MAX_ENTRY_BYTES = 32 * 1024 * 1024
"""A request of 2,048 tokens with all hidden states (width 2,048, 8 bytes a value) is this large."""

DEAD_LETTERS_MAX_BYTES = 16 * 1024 * 1024
"""Dead letters are for a person to look at; a few suffice."""

_FIELD = "t"

# What Redis needs for an entry besides its data (id, field name, listpack, radix tree); measured: about 60.
_OVERHEAD_BYTES = 64

# A read blocks in slices of this length, below the socket timeout, and looks for entries to reclaim between.
_BLOCK_SLICE_MS = 1_000

# What Redis says to a reader whose group is gone; the second one when it goes while the reader waits.
_NO_GROUP = ("NOGROUP", "UNBLOCKED")

# It starts (LOADING), lost its master (READONLY, MASTERDOWN) or part of its cluster; all of that passes.
_AWAY = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,
)

# It cannot save (disk full) and takes no writes until it can.
_CANNOT_SAVE = "MISCONF"

# How many pending entries one XPENDING lists.
_PAGE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One delivery. `deliveries` counts this one: 1 is the first."""

    id: str
    data: bytes
    deliveries: int


def connect(url: str, *, timeout: timedelta = timedelta(seconds=3)) -> Redis:
    """Return a client for `redis://host:port/db` or `unix:///path`; InvalidInput, without the address, for neither.

    It gives up on a silent server after `timeout`, which must exceed the one second that a `Consumer` blocks.
    """
    try:
        return Redis.from_url(
            url,
            socket_timeout=timeout.total_seconds(),
            socket_connect_timeout=timeout.total_seconds(),
            # No silent retry: a read whose reply was lost would be repeated without a look at what it left pending,
            # and an append would be made twice. Connections that were closed while idle the pool replaces itself.
            retry=Retry(NoBackoff(), 0),
            protocol=2,  # the replies below have one shape since Redis 5, on every server
        )
    except ValueError:  # its text may hold part of the password, as its cause would
        raise InvalidInput("the Redis address is none: it must be redis://host:port/db or unix:///path") from None


def key(namespace: str, speculator: str) -> str:
    """The stream of a speculator's traces: what pods write to and its trainer reads."""
    return f"updraft:{namespace}:{speculator}:samples:v1"


class Producer:
    """Appends to a stream and keeps it near `max_bytes`.

    Redis bounds a stream in entries, so the bound is bytes over the mean size of recent entries.
    """

    def __init__(self, client: Redis, key: str, *, max_bytes: int, max_entry_bytes: int = MAX_ENTRY_BYTES) -> None:
        self._client = client
        self._key = key
        self._bound = _Bound(max_bytes)
        self._max_entry_bytes = min(max_entry_bytes, max_bytes)

    async def append(self, entry: bytes) -> int:
        """Add `entry` and return how many older ones had to go, unread or unacknowledged, to make room.

        InvalidInput when it exceeds the limit of one entry, Unavailable when Redis is away, Exhausted when it is
        full. After Unavailable the entry may or may not be there.
        """
        if len(entry) > self._max_entry_bytes:
            raise InvalidInput(f"a stream entry of {len(entry)} bytes exceeds the limit, {self._max_entry_bytes}")
        with _redis_errors():
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.xadd(self._key, {_FIELD: entry})
                # A separate XTRIM in the same round trip, because XADD MAXLEN does not tell what it dropped.
                pipe.xtrim(self._key, maxlen=self._bound.entries(len(entry)), approximate=True)
                replies = await pipe.execute()
        return int(replies[1])


class Consumer:
    """One named member of a consumer group. Not for concurrent use: one task reads, handles and acknowledges.

    `claim_idle` is how long an entry of another consumer must have been untouched to be taken over; entries in hand
    are renewed by `read`, so it has to exceed the longest pause between two reads. `name` must be stable over
    restarts. `lost_total` counts entries that the bound deleted before they were settled, `dead_letters_total` those
    set aside, `lost_letters_total` those among them that a full Redis could not keep.
    """

    def __init__(
        self,
        client: Redis,
        key: str,
        *,
        group: str,
        name: str,
        claim_idle: timedelta,
        max_deliveries: int = 5,
    ) -> None:
        self._client = client
        self._key = key
        self._dead_key = f"{key}:dead"
        self._dead_bound = _Bound(DEAD_LETTERS_MAX_BYTES)
        self._group = group
        self._name = name
        self._claim_idle_ms = int(claim_idle.total_seconds() * 1000)
        self._max_deliveries = max_deliveries
        self._in_hand: set[str] = set()
        self._next_takeover_s = 0.0
        # Entries may be pending under our name without being in hand: after a crash, or a read that was cut off.
        self._may_own_more = True
        self.lost_total = 0
        self.dead_letters_total = 0
        self.lost_letters_total = 0

    @property
    def in_hand(self) -> frozenset[str]:
        """The ids that were read and are not settled yet."""
        return frozenset(self._in_hand)

    async def open(self) -> None:
        """Create the group, from the stream's first entry on, unless it exists."""
        with _redis_errors():
            await self._create_group()

    async def read(self, *, count: int, block: timedelta) -> list[Entry]:
        """Return up to `count` entries: unsettled ones first, then new ones; an empty list after `block`.

        Unavailable when Redis is away. Neither that nor a cancellation loses an entry.
        """
        deadline_s = asyncio.get_running_loop().time() + block.total_seconds()
        with _redis_errors():
            while True:
                left_ms = int((deadline_s - asyncio.get_running_loop().time()) * 1000)
                block_ms = min(left_ms, _BLOCK_SLICE_MS)
                try:
                    entries = await self._reclaim(count) or await self._new(count, block_ms)
                except redis.exceptions.ResponseError as error:
                    if not str(error).startswith(_NO_GROUP):
                        raise
                    logger.warning("Redis lost the consumer group; made again", extra={"stream": self._key})
                    await self._create_group()
                    continue
                if entries or left_ms <= _BLOCK_SLICE_MS:
                    return entries

    async def ack(self, ids: Iterable[str]) -> None:
        """Settle entries whose effect is durable: they leave the group and the stream together."""
        ids = list(ids)
        if not ids:
            return
        with _redis_errors():
            # Cut off between the two, the entry is pending without data, which the next life settles (and counts as
            # lost).
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.xdel(self._key, *ids)
                pipe.xack(self._key, self._group, *ids)
                await pipe.execute()
        self._in_hand.difference_update(ids)

    async def dead_letter(self, entry: Entry, reason: str) -> None:
        """Settle an entry that can never be handled; `<key>:dead` keeps it, for a while, with the reason.

        A full Redis cannot keep it. Then it is settled all the same, counted and logged: what nobody can handle must
        not hold up what somebody can, and a full Redis is emptied by settling. Cut off in between, it is kept twice.
        """
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
        """Whether there was room for it."""
        letter: dict[Any, Any] = {_FIELD: entry.data, "reason": reason, "id": entry.id, "deliveries": entry.deliveries}
        maxlen = self._dead_bound.entries(len(entry.data))
        with _redis_errors():
            try:
                await self._client.xadd(self._dead_key, letter, maxlen=maxlen, approximate=True)
            except redis.exceptions.OutOfMemoryError:
                return False
        return True

    async def _create_group(self) -> None:
        try:
            await self._client.xgroup_create(self._key, self._group, id="0", mkstream=True)
        except redis.exceptions.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    async def _reclaim(self, count: int) -> list[Entry]:
        if self._may_own_more:
            if entries := await self._claim(count, min_idle_ms=0, consumername=self._name):
                return entries
            self._may_own_more = False
        now_s = asyncio.get_running_loop().time()
        if now_s < self._next_takeover_s:
            return []
        await self._renew()
        with self._cut_off_owns_more():
            entries = await self._claim(count, min_idle_ms=self._claim_idle_ms, idle=self._claim_idle_ms)
        if not entries:  # else there may be more, at once
            self._next_takeover_s = now_s + self._claim_idle_ms / 4000
        return entries

    async def _renew(self) -> None:
        """Tell the others that what is in hand is alive; JUSTID counts no delivery."""
        if self._in_hand:
            await self._client.xclaim(self._key, self._group, self._name, 0, [*self._in_hand], justid=True)

    async def _claim(self, count: int, *, min_idle_ms: int, **which: Any) -> list[Entry]:
        """Make pending entries ours and return them, after setting aside those that are lost or poison."""
        while deliveries := await self._pending(count, **which):
            # The minimal idle time again: of two consumers that saw the same entry, only one gets it.
            reply: Any = await self._client.xclaim(self._key, self._group, self._name, min_idle_ms, [*deliveries])
            claimed = [self._entry(row, deliveries) for row in reply if row[0] is not None]
            await self._settle_lost(deliveries.keys() - {entry.id for entry in claimed})
            entries = [entry for entry in claimed if entry.deliveries <= self._max_deliveries]
            for entry in claimed:
                if entry.deliveries > self._max_deliveries:
                    await self.dead_letter(entry, f"not handled in {self._max_deliveries} deliveries")
            if entries:
                self._in_hand.update(entry.id for entry in entries)
                return entries
        return []

    async def _pending(self, count: int, **which: Any) -> dict[str, int]:
        """List up to `count` pending entries that are not in hand, with the deliveries of each so far."""
        start = "-"
        while True:
            rows: Any = await self._client.xpending_range(
                self._key, self._group, min=start, max="+", count=_PAGE, **which
            )
            found = {row["message_id"].decode(): int(row["times_delivered"]) for row in rows}
            wanted = [id_ for id_ in found if id_ not in self._in_hand]
            if wanted or len(rows) < _PAGE:
                return {id_: found[id_] for id_ in wanted[:count]}
            start = f"({[*found][-1]}"

    async def _settle_lost(self, ids: Iterable[str]) -> None:
        """Acknowledge those of `ids` that the stream's bound deleted while they were pending."""
        for id_ in ids:
            if not await self._client.xrange(self._key, id_, id_):
                await self._client.xack(self._key, self._group, id_)
                self.lost_total += 1

    async def _new(self, count: int, block_ms: int) -> list[Entry]:
        with self._cut_off_owns_more():
            reply: Any = await self._client.xreadgroup(
                self._group,
                self._name,
                {self._key: ">"},
                count=count,
                block=block_ms if block_ms > 0 else None,  # 0 would mean for ever
            )
        rows = reply[0][1] if reply else []
        # A group that was lost and created again starts over, also with what is still in hand.
        entries = [entry for row in rows if (entry := self._entry(row, {})).id not in self._in_hand]
        self._in_hand.update(entry.id for entry in entries)
        return entries

    @contextmanager
    def _cut_off_owns_more(self) -> Iterator[None]:
        """A command that makes entries ours, but is cut off, leaves them for the next read to find."""
        self._may_own_more = True
        yield
        self._may_own_more = False

    @staticmethod
    def _entry(row: tuple[bytes, dict[bytes, bytes]], deliveries: dict[str, int]) -> Entry:
        id_ = row[0].decode()
        return Entry(id=id_, data=row[1].get(_FIELD.encode(), b""), deliveries=deliveries.get(id_, 0) + 1)


class _Bound:
    """Turns a bound in bytes into a number of entries by the mean size of recent ones."""

    _WINDOW = 128  # entries: short enough to follow a shift to large ones before the stream holds many

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._mean_bytes = 0.0
        self._seen = 0

    def entries(self, size_bytes: int) -> int:
        """Take the size of the next entry into account; return how many entries may stay, at least one."""
        self._seen += 1
        self._mean_bytes += (size_bytes + _OVERHEAD_BYTES - self._mean_bytes) / min(self._seen, self._WINDOW)
        return max(1, int(self._max_bytes / self._mean_bytes))


@contextmanager
def _redis_errors() -> Iterator[None]:
    try:
        yield
    except redis.exceptions.RedisError as error:
        # In a pipeline redis-py puts the command, and with it the user's data, in front of what Redis said.
        said = str(error).rpartition("pipeline caused error: ")[2].strip("(',)")
        if isinstance(error, redis.exceptions.OutOfMemoryError):
            raise Exhausted("Redis has reached its maxmemory") from None
        if said.startswith(_CANNOT_SAVE):
            raise Exhausted(f"Redis cannot save and takes no writes: {said}") from None
        if isinstance(error, _AWAY):
            raise Unavailable(f"Redis is away: {said}") from None
        raise UpdraftError(f"Redis refused a command: {said}") from None
