"""A Redis that dies, comes back (with its data, or empty), hangs, fills up, or drops its connections."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from redis.asyncio import Redis
from tests.support.redis_server import RedisServer

from updraft_chassis import streams
from updraft_chassis.errors import Exhausted, Unavailable
from updraft_chassis.retry import Backoff
from updraft_chassis.streams import Consumer, Entry, Producer

KEY = "updraft:test:chat:samples:v1"
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
async def ends(server: RedisServer) -> AsyncIterator[tuple[Redis, Producer, Consumer]]:
    async with streams.connect(server.url, timeout=timedelta(seconds=1.5)) as client:
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
            with pytest.raises(Unavailable, match="Redis is away"):
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
        await producer.append(b"new")
        (entry,) = await consumer.read(count=1, block=NOW)
        assert entry.data == b"new"
        await consumer.ack([lost.id, entry.id])
        assert consumer.in_hand == frozenset()


async def test_a_redis_that_hangs_is_unavailable_within_the_timeout(volatile: RedisServer) -> None:
    async with ends(volatile) as (_, producer, consumer):
        volatile.pause()
        start = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable):
            await producer.append(b"one")
        assert asyncio.get_running_loop().time() - start < 3
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
        with pytest.raises(Exhausted, match="maxmemory"):
            await consumer.dead_letter(entry, "odd")
        await consumer.ack([entry.id])
        assert await client.xlen(KEY) == 0


class Reader:
    """Reads and acknowledges through every outage; remembers each entry's effect once, like the trainer's dedupe."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._backoff = Backoff(initial_s=0.01, cap_s=0.1)
        self.effects: set[bytes] = set()
        self.in_hand: list[Entry] = []

    async def run_until(self, wanted: set[bytes]) -> None:
        while not (self.effects >= wanted):
            try:
                entries = await self._consumer.read(count=7, block=timedelta(milliseconds=50))
                self.effects |= {entry.data for entry in entries}
                self.in_hand += entries
                await self._consumer.ack([entry.id for entry in self.in_hand])
                self.in_hand.clear()
            except Unavailable:
                await asyncio.sleep(next(self._backoff))


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
async def chaos(durable: RedisServer) -> AsyncIterator[tuple[Redis, Producer, Reader]]:
    async with ends(durable) as (client, producer, consumer):
        yield client, producer, Reader(consumer)
        assert await client.xlen(KEY) == 0
        assert (await client.xpending(KEY, "trainer"))["pending"] == 0


ENTRIES = [b"entry %d" % i for i in range(400)]


async def test_killed_servers_lose_nothing_that_was_appended(
    durable: RedisServer, chaos: tuple[Redis, Producer, Reader]
) -> None:
    _, producer, reader = chaos
    async with asyncio.TaskGroup() as group, asyncio.timeout(60):
        reading = group.create_task(reader.run_until(set(ENTRIES)))
        for start in range(0, 400, 100):
            sending = group.create_task(send_all(producer, ENTRIES[start : start + 100]))
            await asyncio.to_thread(durable.kill)
            await asyncio.to_thread(durable.start)
            await sending
        await reading


async def test_broken_connections_lose_nothing_that_was_appended(
    durable: RedisServer, chaos: tuple[Redis, Producer, Reader]
) -> None:
    _, producer, reader = chaos
    async with asyncio.TaskGroup() as group, asyncio.timeout(60), streams.connect(durable.url) as killer:
        sending = group.create_task(send_all(producer, ENTRIES))
        reading = group.create_task(reader.run_until(set(ENTRIES)))
        while not (sending.done() and reading.done()):
            await killer.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.003)
