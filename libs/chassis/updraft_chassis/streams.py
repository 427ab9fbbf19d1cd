"""At-least-once delivery over Redis streams, each bounded in bytes.

A speculator has one stream per shard, and a trace goes to the shard of its id. A shard has one reader, so shards spread the
work over the ranks of a trainer and over the nodes of a Redis Cluster. The keys of a shard have one hash tag, so they are on
one node.

An entry stays pending until `ack`, so a crash redelivers it, and a reader must be idempotent (the trainer deduplicates by
trace id). An entry that was not handled in `max_deliveries` attempts goes to `<key>:dead`, so that it cannot crash the
consumer again and again. Entries are lost only to the size limit: the oldest go first, and `append` returns how many.
Rejected: XAUTOCLAIM (it cannot skip entries that are being handled, and it counts deliveries that never happened), blocking
the producer on a full stream (serving never waits for training), MULTI (a full Redis rejects every command in a transaction,
so the stream could never be emptied).
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import redis.exceptions
from redis.asyncio import Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from updraft_chassis.errors import Exhausted, InvalidInput, Unavailable, UpdraftError

logger = logging.getLogger(__name__)

MAX_ENTRY_BYTES = 8 * 1024 * 1024
"""Twice the size of a chunk of a long request, whose first one also has the ids of the prompt."""

MAX_SHARDS = 64
"""More than a trainer has ranks or a cluster has nodes; whoever deletes streams need not know how many there were."""

DEAD_LETTERS_MAX_BYTES = 16 * 1024 * 1024
"""Dead letters are there for a person to inspect; a few are enough."""

_FIELD = "t"

# Redis's overhead per entry (id, field name, listpack, radix tree); measured: about 60.
_OVERHEAD_BYTES = 64

# A read blocks for slices of this length, below the socket timeout, and looks for entries to reclaim in between.
_BLOCK_SLICE_MS = 1_000

# Redis's error codes for a missing consumer group; the second one if it is deleted while the reader waits.
_NO_GROUP = ("NOGROUP", "UNBLOCKED")

# Redis is starting (LOADING) or has lost its master (READONLY, MASTERDOWN) or a part of its cluster. All of these pass.
_TEMPORARY = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.ClusterError,
    redis.exceptions.RedisClusterException,  # no node of the cluster can be reached
)

_CLUSTER = "+cluster"
"""Suffix of a scheme."""

Client: TypeAlias = Redis | RedisCluster

# Redis cannot save (full disk) and rejects writes until it can.
_CANNOT_SAVE = "MISCONF"

# Pending entries per XPENDING call.
_PAGE = 256

# Entries per XRANGE call; each may have 8 MiB.
_SCANNED = 4

# Of a command, sent at a time.
_PIECE_BYTES = 128 * 1024


class _InPieces(AbstractConnection):
    """Sends an entry in pieces, because asyncio may copy what a socket does not take at once, and the event loop stands still
    meanwhile. `make bench-width ARGS='--rows path'` measures how long."""

    async def _send_packed_command(self, command: Iterable[bytes]) -> None:
        """redis-py calls this when it is connected, with one timeout. All pieces go to one connection: on a new one Redis would
        take the middle of an entry, which is a client's text, for commands."""
        writer = self._writer
        for piece in _pieces(command):
            if writer is None or self._writer is not writer:
                raise redis.exceptions.ConnectionError("the connection was closed while a command was being sent")
            writer.write(piece)
            await writer.drain()


class _Tcp(_InPieces, Connection):
    pass


class _Tls(_InPieces, SSLConnection):
    """Reads its CA again for each connection, because the file may have changed."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        self.ssl_context.context = None  # redis-py's own, which it would keep
        arguments: Mapping[str, Any] = super()._connection_arguments()
        return arguments


class _Unix(_InPieces, UnixDomainSocketConnection):
    pass


_CONNECTIONS = {Connection: _Tcp, SSLConnection: _Tls, UnixDomainSocketConnection: _Unix}


def _pieces(command: Iterable[bytes]) -> Iterator[memoryview]:
    """The parts of a command in views of at most `_PIECE_BYTES`."""
    for part in command:
        view = memoryview(part)
        for first in range(0, len(view), _PIECE_BYTES):
            yield view[first : first + _PIECE_BYTES]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One delivery. `deliveries` includes this one, so 1 is the first."""

    id: str
    data: bytes
    deliveries: int

    @property
    def received_ms(self) -> int:
        """When Redis received it, in Unix milliseconds: ids start with that."""
        return int(self.id.partition("-")[0])


def connect(url: str, *, timeout: timedelta = timedelta(seconds=3)) -> Client:
    """A client for `redis://host:port/db`, `redis+cluster://host:port` (any node) or `unix:///path`.

    With `rediss` instead of `redis` it uses TLS; `?ssl_ca_certs=/path` names the CA. InvalidInput, without the address, for
    anything else. It gives up on a silent server after `timeout`, which must exceed the one second that a `Consumer` blocks.
    """
    kind = RedisCluster if url.partition("://")[0].endswith(_CLUSTER) else Redis
    try:
        client = kind.from_url(
            node_url(url),
            socket_timeout=timeout.total_seconds(),
            socket_connect_timeout=timeout.total_seconds(),
            # No hidden retries: after a lost reply, a read would be repeated without checking the entries it left pending,
            # and an append would happen twice. The pool itself replaces connections that were closed while idle.
            retry=Retry(NoBackoff(), 0),
            protocol=2,  # the replies below have had one shape since Redis 5, on every server
        )
    except ValueError:  # its text or its cause may contain a part of the password
        expected = "redis://host:port/db, redis+cluster://host:port, either with rediss for TLS, or unix:///path"
        raise InvalidInput(f"the Redis address is invalid: expected {expected}") from None
    _send_in_pieces(client)
    return client


def _send_in_pieces(client: Client) -> None:
    """Before it connects."""
    if isinstance(client, RedisCluster):
        arguments: dict[str, Any] = client.get_connection_kwargs()  # of the nodes that it will find
        arguments["connection_class"] = _CONNECTIONS[arguments["connection_class"]]
        for node in client.nodes_manager.startup_nodes.values():
            node.connection_class = _CONNECTIONS[node.connection_class]
    else:
        pool = client.connection_pool
        pool.connection_class = _CONNECTIONS[pool.connection_class]


def node_url(url: str) -> str:
    """The address of the one node that a `redis+cluster` address names; other addresses as they are."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme.removesuffix(_CLUSTER)}{separator}{rest}"


def keys(namespace: str, speculator: str, num_shards: int) -> list[str]:
    """Keys of the streams that a speculator's pods write traces to and its trainer reads, by shard."""
    return [f"updraft:{{{namespace}:{speculator}:{shard}}}:samples:v1" for shard in range(num_shards)]


def lease_key(namespace: str, speculator: str) -> str:
    """Key of the lease of a speculator's trainer."""
    return f"updraft:{{{namespace}:{speculator}:0}}:trainer"


def patterns(namespace: str, speculator: str) -> tuple[str, str]:
    """Glob patterns of a speculator's streams, and of all its keys."""
    all_keys = f"updraft:{{{namespace}:{speculator}:*"
    return f"{all_keys}}}:samples:v1", all_keys


def shard_of(trace_id: bytes, num_shards: int) -> int:
    """The shard of a trace, the same on every pod."""
    return int.from_bytes(hashlib.sha256(trace_id).digest()[:8]) % num_shards


def shards_of(rank: int, num_ranks: int, num_shards: int) -> range:
    """The shards that a rank of a trainer reads; each shard is one rank's. InvalidInput if shards are fewer than ranks."""
    if not 0 <= rank < num_ranks <= num_shards:
        raise InvalidInput(
            f"rank {rank} of {num_ranks} cannot read {num_shards} shards: every rank needs one of its own"
        )
    return range(rank, num_shards, num_ranks)


async def unowned_shards(client: Client, namespace: str, speculator: str, num_shards: int) -> list[int]:
    """Shards from `num_shards` on that hold traces: pods write to more shards than the trainer reads.

    Unavailable if Redis is unreachable.
    """
    with redis_errors():
        async with client.pipeline(transaction=False) as pipe:
            for key in keys(namespace, speculator, MAX_SHARDS)[num_shards:]:
                pipe.xlen(key)
            lengths = await pipe.execute()
    return [shard for shard, length in enumerate(lengths, start=num_shards) if length]


async def num_unread(client: Client, namespace: str, speculator: str) -> int:
    """Traces of a speculator that its trainer has not settled, in all shards.

    Unavailable if Redis is unreachable, UpdraftError if this user may not run XLEN.
    """
    with redis_errors():
        async with client.pipeline(transaction=False) as pipe:
            for key in keys(namespace, speculator, MAX_SHARDS):
                pipe.xlen(key)
            return sum(await pipe.execute())


async def max_memory(client: Client) -> int:
    """Return the bytes that Redis may use, of a cluster its primaries together; 0 if one of them has no limit.

    Unavailable if Redis is unreachable, UpdraftError if this user may not run INFO.
    """
    with redis_errors():
        if isinstance(client, RedisCluster):
            await client.initialize()
            answers = [await client.info("memory", target_nodes=node) for node in client.get_primaries()]
        else:
            answers = [await client.info("memory")]
    limits = [int(answer.get("maxmemory", 0)) for answer in answers]
    return sum(limits) if all(limits) else 0


async def delete(client: Client, namespace: str, speculator: str) -> None:
    """Delete all streams of a speculator, however many shards it has or had, and its dead letters."""
    with redis_errors():
        for key in keys(namespace, speculator, MAX_SHARDS):
            await client.unlink(key, _dead(key))


class Producer:
    """Appends to a stream and keeps it near `max_bytes`. Redis bounds a stream in entries, so the bound is bytes over the mean
    size of recent entries.

    With `retention_s`, each entry removes those that were that old at this producer's last one, by the clock of Redis: clocks
    of pods may differ. The stream disappears that long after its last entry, whoever is there to read or write it then.
    """

    def __init__(
        self,
        client: Client,
        key: str,
        *,
        max_bytes: int,
        max_entry_bytes: int = MAX_ENTRY_BYTES,
        retention_s: int | None = None,
    ) -> None:
        self._client = client
        self._key = key
        self._bound = _Bound(max_bytes)
        self._retention_s = retention_s
        self._last_ms = 0
        """When Redis took the last entry, by its clock; 0 before the first one."""
        self._complained: set[int] = set()
        """Commands, by their place, whose refusal is in the log."""
        self.max_entry_bytes = min(max_entry_bytes, max_bytes)
        """The limit of an entry."""

    async def append(self, entry: bytes) -> int:
        """Add `entry` and return how many older entries, read or not, were removed to make room.

        InvalidInput if the entry exceeds its size limit, Unavailable if Redis is unreachable, Exhausted if Redis is full.
        After Unavailable the entry may or may not have been added.
        """
        if len(entry) > self.max_entry_bytes:
            raise InvalidInput(f"a stream entry of {len(entry)} bytes exceeds the limit, {self.max_entry_bytes}")
        with redis_errors():
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.xadd(self._key, {_FIELD: entry})
                # A separate XTRIM in the same round trip, because XADD MAXLEN does not return what it removed.
                pipe.xtrim(self._key, maxlen=self._bound.entries(len(entry)), approximate=True)
                self._expire(pipe)
                added, *others = await pipe.execute(raise_on_error=False)
            if isinstance(added, Exception):
                raise added
        self._last_ms = int(added.partition(b"-")[0])
        self._complain(others)
        return 0 if isinstance(others[0], Exception) else int(others[0])

    def _expire(self, pipe: Any) -> None:
        """Without a retention, the expiry that a former one left goes."""
        if self._retention_s is None:
            pipe.persist(self._key)
            return
        pipe.pexpire(self._key, 1000 * self._retention_s)
        if self._last_ms:
            pipe.xtrim(self._key, minid=max(0, self._last_ms - 1000 * self._retention_s), approximate=False)

    def _complain(self, replies: Sequence[Any]) -> None:
        """Log each refusal once. The entry is in the stream, so it must not be added again because of one."""
        for place, reply in enumerate(replies):
            if isinstance(reply, Exception) and place not in self._complained:
                self._complained.add(place)
                facts = {"stream": self._key, "error": str(reply)}
                logger.warning("Redis refuses to limit a stream by size or age; traces may stay longer", extra=facts)


class ShardedProducer:
    """Appends each trace to the stream of its shard, and keeps the streams near `max_bytes` together."""

    def __init__(self, client: Client, keys: Sequence[str], *, max_bytes: int, retention_s: int | None = None) -> None:
        self._producers = [
            Producer(client, key, max_bytes=max_bytes // len(keys), retention_s=retention_s) for key in keys
        ]

    @property
    def max_entry_bytes(self) -> int:
        """The limit of an entry, which may be no larger than its stream: with many shards each is small."""
        return min(producer.max_entry_bytes for producer in self._producers)

    async def append(self, trace_id: bytes, entry: bytes) -> int:
        """See `Producer.append`."""
        return await self._producers[shard_of(trace_id, len(self._producers))].append(entry)


async def expire(client: Client, key: str, retention_s: int) -> None:
    """Delete entries of a stream, and of its dead letters, that are older."""
    with redis_errors():
        for each in (key, _dead(key)):
            await client.xtrim(each, minid=_oldest(retention_s), approximate=False)


async def delete_entries(client: Client, key: str, is_unwanted: Callable[[Entry], bool]) -> int:
    """Delete the unwanted entries of a stream, and of its dead letters; return how many. `is_unwanted` runs in a thread.

    Entries that are pending at a consumer are deleted too, and it then counts them as lost. Unavailable if Redis is
    unreachable: some may be deleted then, and the call can be repeated.
    """
    num_deleted = 0
    for each in (key, _dead(key)):
        start = "-"
        while rows := await _range(client, each, start):
            start = f"({rows[-1][0].decode()}"
            unwanted = await asyncio.to_thread(_ids, rows, is_unwanted)
            if unwanted:
                with redis_errors():
                    num_deleted += int(await client.xdel(each, *unwanted))
    return num_deleted


def _entry(row: tuple[bytes, dict[bytes, bytes]], *, deliveries: int = 0) -> Entry:
    return Entry(id=row[0].decode(), data=row[1].get(_FIELD.encode(), b""), deliveries=deliveries)


def _ids(rows: Iterable[tuple[bytes, dict[bytes, bytes]]], is_wanted: Callable[[Entry], bool]) -> list[bytes]:
    return [row[0] for row in rows if is_wanted(_entry(row))]


async def _range(client: Client, key: str, start: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
    with redis_errors():
        rows: Any = await client.xrange(key, min=start, count=_SCANNED)
    return list(rows)


def _oldest(retention_s: int) -> int:
    """The lowest ID that is young enough: IDs begin with the milliseconds of Redis's clock, which is taken for ours."""
    return max(0, int(1000 * (time.time() - retention_s)))


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
        self._dead_key = _dead(key)
        self._dead_bound = _Bound(DEAD_LETTERS_MAX_BYTES)
        self._sizes = _MeanSize()
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
        letter: dict[Any, Any] = {_FIELD: data, "reason": reason, "id": entry.id, "deliveries": entry.deliveries}
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
        return _entry(row, deliveries=deliveries.get(row[0].decode(), 0) + 1)


def _dead(key: str) -> str:
    return f"{key}:dead"


class _MeanSize:
    """The mean size of recent entries, 0 before the first one."""

    _WINDOW = 128  # entries: short enough to adapt before the stream holds many larger ones

    def __init__(self) -> None:
        self.mean_bytes = 0.0
        self._num_entries = 0

    def add(self, size_bytes: int) -> None:
        self._num_entries += 1
        self.mean_bytes += (size_bytes + _OVERHEAD_BYTES - self.mean_bytes) / min(self._num_entries, self._WINDOW)


class _Bound:
    """Converts a limit in bytes into a number of entries, by the mean size of recent ones."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._sizes = _MeanSize()

    def entries(self, size_bytes: int) -> int:
        """Count the next entry's size; return how many entries may stay, at least one."""
        self._sizes.add(size_bytes)
        return max(1, int(self._max_bytes / self._sizes.mean_bytes))


@contextmanager
def redis_errors() -> Iterator[None]:
    """Raise Unavailable, Exhausted or UpdraftError for errors of Redis."""
    try:
        yield
    except (redis.exceptions.RedisError, redis.exceptions.RedisClusterException) as error:
        # In a pipeline redis-py prepends the command, and with it the user's data, to the message from Redis.
        message = str(error).rpartition("pipeline caused error: ")[2].strip("(',)")
        if isinstance(error, redis.exceptions.OutOfMemoryError):
            raise Exhausted("Redis has reached its maxmemory") from None
        if message.startswith(_CANNOT_SAVE):
            raise Exhausted(f"Redis cannot save and rejects writes: {message}") from None
        if isinstance(error, _TEMPORARY):
            raise Unavailable(f"Redis is unavailable: {message}") from None
        raise UpdraftError(f"Redis rejected a command: {message}") from None
