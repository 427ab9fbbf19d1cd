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
from typing import Any, Self, TypeAlias

import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from updraft_chassis.errors import Exhausted, InvalidInput, Unavailable, UpdraftError
from updraft_chassis.streams.connections import use_pieces

logger = logging.getLogger(__name__)

MAX_ENTRY_BYTES = 8 * 1024 * 1024
"""Twice the size of a chunk of a long request, whose first one also has the ids of the prompt."""

MAX_SHARDS = 64
"""More than a trainer has ranks or a cluster has nodes; whoever deletes streams need not know how many there were."""

FIELD = "t"
"""The key of an entry, with its bytes."""

# Redis's overhead per entry (id, field name, listpack, radix tree); measured: about 60.
_OVERHEAD_BYTES = 64

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

# Entries per XRANGE call; each may have 8 MiB.
_SCANNED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One delivery. `deliveries` includes this one, so 1 is the first. `data` of more than 128 KiB is a read-only view of
    memory of its own, which any part of it keeps."""

    id: str
    data: bytes | memoryview
    deliveries: int

    @property
    def received_ms(self) -> int:
        """When Redis received it, in Unix milliseconds: ids start with that."""
        return int(self.id.partition("-")[0])

    @classmethod
    def of(cls, row: tuple[bytes, Mapping[bytes, bytes | memoryview]], *, deliveries: int = 0) -> Self:
        """The entry of a reply."""
        return cls(id=row[0].decode(), data=row[1].get(FIELD.encode(), b""), deliveries=deliveries)


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
    use_pieces(client)
    return client


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
            await client.unlink(key, dead_key(key))


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
        self._bound = Bound(max_bytes)
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
                pipe.xadd(self._key, {FIELD: entry})
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
        for each in (key, dead_key(key)):
            await client.xtrim(each, minid=_oldest(retention_s), approximate=False)


async def delete_entries(client: Client, key: str, is_unwanted: Callable[[Entry], bool]) -> int:
    """Delete the unwanted entries of a stream, and of its dead letters; return how many. `is_unwanted` runs in a thread.

    Entries that are pending at a consumer are deleted too, and it then counts them as lost. Unavailable if Redis is
    unreachable: some may be deleted then, and the call can be repeated.
    """
    num_deleted = 0
    for each in (key, dead_key(key)):
        start = "-"
        while rows := await _range(client, each, start):
            start = f"({rows[-1][0].decode()}"
            unwanted = await asyncio.to_thread(_ids, rows, is_unwanted)
            if unwanted:
                with redis_errors():
                    num_deleted += int(await client.xdel(each, *unwanted))
    return num_deleted


def _ids(rows: Iterable[tuple[bytes, dict[bytes, bytes]]], is_wanted: Callable[[Entry], bool]) -> list[bytes]:
    return [row[0] for row in rows if is_wanted(Entry.of(row))]


async def _range(client: Client, key: str, start: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
    with redis_errors():
        rows: Any = await client.xrange(key, min=start, count=_SCANNED)
    return list(rows)


def _oldest(retention_s: int) -> int:
    """The lowest ID that is young enough: IDs begin with the milliseconds of Redis's clock, which is taken for ours."""
    return max(0, int(1000 * (time.time() - retention_s)))


def dead_key(key: str) -> str:
    """Key of the dead letters of a stream."""
    return f"{key}:dead"


class MeanSize:
    """The mean size of recent entries, 0 before the first one."""

    _WINDOW = 128  # entries: short enough to adapt before the stream holds many larger ones

    def __init__(self) -> None:
        self.mean_bytes = 0.0
        self._num_entries = 0

    def add(self, size_bytes: int) -> None:
        self._num_entries += 1
        self.mean_bytes += (size_bytes + _OVERHEAD_BYTES - self.mean_bytes) / min(self._num_entries, self._WINDOW)


class Bound:
    """Converts a limit in bytes into a number of entries, by the mean size of recent ones."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._sizes = MeanSize()

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
