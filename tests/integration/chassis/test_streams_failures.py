"""A Redis that dies, comes back (with its data, or empty), hangs, fills up, cannot save, or drops its connections."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from tests.support.redis_server import RedisServer
from tests.support.wait import LONG_S, until

from updraft_chassis import streams
from updraft_chassis.errors import Exhausted, InvalidInput, Unavailable
from updraft_chassis.retry import Backoff
from updraft_chassis.streams import Client, Entry, Producer
from updraft_chassis.streams.consumer import Consumer

KEY = "updraft:{test:chat:0}:samples:v1"
NOW = timedelta(0)


@pytest.fixture
def durable(short_tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(short_tmp_path, durable=True) as server:
        yield server


@pytest.fixture
def volatile(short_tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(short_tmp_path) as server:
        yield server


@asynccontextmanager
async def ends(
    server: RedisServer, *, gives_up_after: timedelta = timedelta(seconds=LONG_S)
) -> AsyncIterator[tuple[Client, Producer, Consumer]]:
    async with streams.connect(server.url, timeout=gives_up_after) as client:
        consumer = Consumer(client, KEY, group="trainer", name="trainer-0", claim_idle=timedelta(hours=1))
        await consumer.open()
        yield client, Producer(client, KEY, max_bytes=1 << 20), consumer


async def test_everything_is_unavailable_while_redis_is_away(durable: RedisServer) -> None:
    async with ends(durable) as (_, producer, consumer):
        await producer.append(b"one")
        (entry,) = await consumer.read(count=1, block=NOW)
        durable.kill()
        for attempt in (
            producer.append(b"two"),
            consumer.read(count=1, block=NOW),
            consumer.ack([entry.id]),
            consumer.dead_letter(entry, "odd"),
            consumer.open(),
        ):
            with pytest.raises(Unavailable, match="Redis is unavailable"):
                await attempt
        assert consumer.in_hand == {entry.id}


async def test_a_redis_that_comes_back_with_its_data_goes_on_where_it_was(durable: RedisServer) -> None:
    async with ends(durable) as (client, producer, consumer):
        await producer.append(b"one")
        await producer.append(b"two")
        (first,) = await consumer.read(count=1, block=NOW)
        durable.kill()
        with pytest.raises(Unavailable):
            await consumer.read(count=1, block=NOW)
        durable.start()
        (second,) = await consumer.read(count=10, block=NOW)
        assert second.data == b"two"
        await consumer.ack([first.id, second.id])
        assert await client.xlen(KEY) == 0
        assert (await client.xpending(KEY, "trainer"))["pending"] == 0


async def test_a_redis_that_comes_back_empty_is_used_without_a_new_start(volatile: RedisServer) -> None:
    async with ends(volatile) as (_, producer, consumer):
        await producer.append(b"lost")
        (lost,) = await consumer.read(count=1, block=NOW)
        volatile.kill()
        volatile.start()
        await send_all(producer, [b"new"])
        (entry,) = await consumer.read(count=1, block=NOW)
        assert entry.data == b"new"
        await consumer.ack([lost.id, entry.id])
        assert consumer.in_hand == frozenset()


async def test_a_redis_that_hangs_is_unavailable_within_the_timeout(volatile: RedisServer) -> None:
    async with ends(volatile, gives_up_after=timedelta(seconds=1.5)) as (_, producer, consumer):
        volatile.pause()
        with pytest.raises(Unavailable, match="Timeout"):
            await producer.append(b"one")
        volatile.resume()
        await producer.append(b"two")
        assert b"two" in {entry.data for entry in await consumer.read(count=10, block=NOW)}


async def test_a_full_redis_is_exhausted_and_acknowledging_still_works(volatile: RedisServer) -> None:
    async with ends(volatile) as (client, producer, consumer):
        await producer.append(b"one")
        (entry,) = await consumer.read(count=1, block=NOW)
        await client.config_set("maxmemory", 1)
        with pytest.raises(Exhausted, match="maxmemory"):
            await producer.append(b"two")
        await consumer.ack([entry.id])
        assert await client.xlen(KEY) == 0


async def test_a_consumer_that_starts_beside_a_full_redis_empties_it(volatile: RedisServer) -> None:
    async with ends(volatile) as (client, producer, _):
        for number in range(5):
            await producer.append(b"%d" % number)
        await client.config_set("maxmemory", 1)
        late = Consumer(client, KEY, group="trainer", name="trainer-0", claim_idle=timedelta(hours=1))
        await late.open()
        await late.ack([entry.id for entry in await late.read(count=10, block=NOW)])
        assert (await client.xlen(KEY), late.lost_total) == (0, 0)


async def test_the_first_consumer_of_a_stream_that_filled_redis_costs_one_entry(
    volatile: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with streams.connect(volatile.url) as client:
        producer = Producer(client, KEY, max_bytes=1 << 24)
        for number in range(40):
            await producer.append(bytes([number]) * 100_000)
        await client.config_set("maxmemory", (await client.info("memory"))["used_memory"] - 50_000)
        with pytest.raises(Exhausted):
            await producer.append(b"one more")
        first = Consumer(client, KEY, group="trainer", name="trainer-0", claim_idle=timedelta(hours=1))
        await first.open()
        assert [entry.data[0] for entry in await first.read(count=100, block=NOW)] == list(range(1, 40))
        assert first.lost_total == 1
    assert caplog.text.count("Redis is full: deleted the oldest trace") == 1


@pytest.mark.parametrize("num_entries", [0, 1], ids=["without the stream", "whose stream is empty"])
async def test_a_consumer_of_a_full_redis_without_traces_is_exhausted(volatile: RedisServer, num_entries: int) -> None:
    async with streams.connect(volatile.url) as client:
        for _ in range(num_entries):
            await client.xadd(KEY, {"of": "another time"})
        await client.xtrim(KEY, maxlen=0)
        await client.config_set("maxmemory", 1)
        late = Consumer(client, KEY, group="trainer", name="trainer-0", claim_idle=timedelta(hours=1))
        with pytest.raises(Exhausted, match="maxmemory"):
            await late.open()


async def test_a_consumer_comes_back_to_its_empty_stream_beside_a_full_redis(volatile: RedisServer) -> None:
    async with ends(volatile) as (client, _, consumer):
        await client.config_set("maxmemory", 1)
        await consumer.open()
        assert await consumer.read(count=1, block=NOW) == []


async def test_poison_does_not_block_a_full_redis_and_its_letter_is_counted_as_lost(
    volatile: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with ends(volatile) as (client, producer, consumer):
        for data in (b"odd", b"poison", b"fine"):
            await producer.append(data)
        odd, _ = await consumer.read(count=2, block=NOW)
        await client.config_set("maxmemory", 1)
        await consumer.dead_letter(odd, "odd")
        assert (consumer.dead_letters_total, consumer.lost_letters_total) == (1, 1)
        name = "trainer-0"
        life = Consumer(client, KEY, group="trainer", name=name, claim_idle=timedelta(hours=1), max_deliveries=1)
        (fine,) = await life.read(count=2, block=NOW)
        assert fine.data == b"fine"
        assert (life.dead_letters_total, life.lost_letters_total) == (1, 1)
        await life.ack([fine.id])
        assert await client.xlen(KEY) == 0
        assert not await client.exists(f"{KEY}:dead")
    assert caplog.text.count("Dead letter, lost: Redis is full") == 2


async def test_a_redis_that_cannot_save_is_exhausted_until_it_can(volatile: RedisServer, short_tmp_path: Path) -> None:
    async with ends(volatile) as (client, producer, consumer):
        await producer.append(b"one")
        (entry,) = await consumer.read(count=1, block=NOW)
        await client.config_set("dbfilename", "dump")
        (short_tmp_path / "dump").mkdir()  # a file cannot take its name
        await client.config_set("save", "3600 1")
        await client.bgsave()

        async def has_failed() -> bool:
            return bool((await client.info("persistence"))["rdb_last_bgsave_status"] == "err")

        await until(has_failed, what="the failed save")
        for attempt in (
            producer.append(b"two"),
            consumer.read(count=1, block=NOW),
            consumer.ack([entry.id]),
            consumer.dead_letter(entry, "odd"),
        ):
            with pytest.raises(Exhausted, match="Redis cannot save and rejects writes: MISCONF"):
                await attempt
        await client.config_set("save", "")
        await consumer.ack([entry.id])
        assert await client.xlen(KEY) == 0


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"cluster-enabled": "yes"}, id="CLUSTERDOWN"),
        pytest.param({"replicaof": "127.0.0.1 1"}, id="READONLY"),
        pytest.param({"replicaof": "127.0.0.1 1", "replica-serve-stale-data": "no"}, id="MASTERDOWN"),
    ],
)
async def test_a_redis_that_takes_no_writes_for_now_is_unavailable(short_tmp_path: Path, state: dict[str, str]) -> None:
    with RedisServer(short_tmp_path, settings=state) as server:
        async with streams.connect(server.url) as client:
            with pytest.raises(Unavailable) as raised:
                await Producer(client, KEY, max_bytes=1 << 20).append(b"private")
    assert "private" not in str(raised.value)


@pytest.mark.attack(
    boundary="redis",
    attack="reading the password from an error about the address",
    outcome="it is not in it",
)
@pytest.mark.parametrize("url", ["http://:secret@host", "redis://:sec/ret@host", "secret"])
def test_an_address_that_is_none_is_told_without_its_password(url: str) -> None:
    with pytest.raises(InvalidInput, match="the Redis address is invalid") as refused:
        streams.connect(url)
    assert "sec" not in str(refused.value)
    assert refused.value.__cause__ is None


@asynccontextmanager
async def lossy_link(server: RedisServer, path: Path) -> AsyncIterator[asyncio.Event]:
    """Another socket of that Redis, `path`. While the event is set, its connections end in place of an answer with an entry."""
    is_lossy = asyncio.Event()

    async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_answer: bool) -> None:
        while data := await source.read(1 << 16):
            if is_answer and is_lossy.is_set() and b"entry" in data:
                break
            target.write(data)
        target.close()

    async def link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        redis_reader, redis_writer = await asyncio.open_unix_connection(server.url.removeprefix("unix://"))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(forward(reader, redis_writer, is_answer=False))
            tasks.create_task(forward(redis_reader, writer, is_answer=True))

    async with await asyncio.start_unix_server(link, path):
        yield is_lossy


async def test_entries_whose_delivery_was_lost_come_with_the_next_read(
    volatile: RedisServer, short_tmp_path: Path
) -> None:
    path = short_tmp_path / "link.sock"
    async with (
        ends(volatile) as (_, producer, _),
        lossy_link(volatile, path) as is_lossy,
        streams.connect(f"unix://{path}") as client,
    ):
        consumer = Consumer(client, KEY, group="trainer", name="trainer-0", claim_idle=timedelta(hours=1))
        assert await consumer.read(count=1, block=NOW) == []
        await producer.append(b"entry")
        is_lossy.set()
        with pytest.raises(Unavailable):
            await consumer.read(count=1, block=NOW)
        is_lossy.clear()
        (entry,) = await consumer.read(count=1, block=NOW)
        assert (entry.data, entry.deliveries) == (b"entry", 2)
        await consumer.ack([entry.id])


async def test_a_large_entry_whose_connection_ends_within_it_comes_whole_with_the_next_read(
    volatile: RedisServer, short_tmp_path: Path
) -> None:
    path, large = short_tmp_path / "link.sock", bytes(1_000_000) + b"entry" * 1000 + bytes(1_000_000)
    async with (
        ends(volatile) as (sender, _, _),
        lossy_link(volatile, path) as is_lossy,
        streams.connect(f"unix://{path}") as client,
    ):
        consumer = Consumer(client, KEY, group="trainer", name="trainer-0", claim_idle=timedelta(hours=1))
        assert await consumer.read(count=1, block=NOW) == []
        await Producer(sender, KEY, max_bytes=4_000_000).append(large)
        is_lossy.set()
        with pytest.raises(Unavailable, match="closed within a value"):
            await consumer.read(count=1, block=NOW)
        is_lossy.clear()
        (entry,) = await consumer.read(count=1, block=NOW)
        assert (entry.data, entry.deliveries) == (large, 2)
        await consumer.ack([entry.id])


class Reader:
    """Reads and acknowledges through every outage; remembers each entry's effect once, like the trainer's dedupe."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._backoff = Backoff(initial_s=0.01, cap_s=0.1)
        self.effects: set[bytes] = set()
        self.in_hand: list[Entry] = []

    async def run_until(self, wanted: set[bytes]) -> None:
        while not self.effects >= wanted:
            await self._turn()

    async def drain(self) -> None:
        """Until nothing more comes: what was appended twice, since the first answer was lost, comes twice."""
        while await self._turn():
            pass

    async def _turn(self) -> bool:
        """Whether there may be more."""
        try:
            entries = await self._consumer.read(count=7, block=timedelta(milliseconds=50))
            self.effects |= {bytes(entry.data) for entry in entries}
            self.in_hand += entries
            await self._consumer.ack([entry.id for entry in self.in_hand])
            self.in_hand.clear()
        except Unavailable:
            await asyncio.sleep(next(self._backoff))
            return True
        return bool(entries)


async def send_all(producer: Producer, entries: list[bytes]) -> None:
    backoff = Backoff(initial_s=0.01, cap_s=0.1)
    for entry in entries:
        while True:
            try:
                await producer.append(entry)
                break
            except Unavailable:
                await asyncio.sleep(next(backoff))


@pytest.fixture
async def chaos(durable: RedisServer) -> AsyncIterator[tuple[Client, Producer, Reader]]:
    async with ends(durable) as (client, producer, consumer):
        reader = Reader(consumer)
        yield client, producer, reader
        await reader.drain()
    async with streams.connect(durable.url) as client:
        assert await client.xlen(KEY) == 0
        assert (await client.xpending(KEY, "trainer"))["pending"] == 0


ENTRIES = [b"entry %d" % i for i in range(400)]


async def test_killed_servers_lose_nothing_that_was_appended(
    durable: RedisServer, chaos: tuple[Client, Producer, Reader]
) -> None:
    _, producer, reader = chaos
    async with asyncio.TaskGroup() as group, asyncio.timeout(2 * LONG_S):
        reading = group.create_task(reader.run_until(set(ENTRIES)))
        for start in range(0, 400, 100):
            sending = group.create_task(send_all(producer, ENTRIES[start : start + 100]))
            await asyncio.to_thread(durable.kill)
            await asyncio.to_thread(durable.start)
            await sending
        await reading


async def test_broken_connections_lose_nothing_that_was_appended(
    durable: RedisServer, chaos: tuple[Client, Producer, Reader]
) -> None:
    _, producer, reader = chaos
    async with asyncio.TaskGroup() as group, asyncio.timeout(2 * LONG_S), streams.connect(durable.url) as killer:
        sending = group.create_task(send_all(producer, ENTRIES))
        reading = group.create_task(reader.run_until(set(ENTRIES)))
        pause_s = 0.003
        while not (sending.done() and reading.done()):
            await killer.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(pause_s)
            pause_s *= 1.02  # on a slow machine nothing would get through in time
