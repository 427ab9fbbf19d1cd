import asyncio
import random
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.support.redis_server import RedisServer, run
from tests.support.wait import LONG_S, until

from updraft_chassis.errors import InvalidInput, UpdraftError
from updraft_chassis.streams import Entry, Producer, ShardedProducer, connect, max_memory
from updraft_chassis.streams.consumer import Consumer

KEY = "updraft:{test:chat:0}:samples:v1"
DEAD = f"{KEY}:dead"
NOW = timedelta(0)
LATER = timedelta(hours=1)


def producer(redis: Redis, *, max_bytes: int = 1 << 20) -> Producer:
    return Producer(redis, KEY, max_bytes=max_bytes)


async def consumer(
    redis: Redis, name: str = "trainer-0", *, claim_idle: timedelta = LATER, max_deliveries: int = 5
) -> Consumer:
    """A new life of that consumer."""
    life = Consumer(redis, KEY, group="trainer", name=name, claim_idle=claim_idle, max_deliveries=max_deliveries)
    await life.open()
    return life


async def append(redis: Redis, *entries: bytes) -> None:
    sender = producer(redis)
    for entry in entries:
        assert await sender.append(entry) == 0


async def read(life: Consumer, count: int = 100) -> list[Entry]:
    return await life.read(count=count, block=NOW)


def data(entries: Sequence[Entry]) -> list[bytes]:
    return [bytes(entry.data) for entry in entries]


async def settle_all(life: Consumer) -> None:
    await life.ack(life.in_hand)


async def test_a_stream_has_an_expiry_as_long_as_it_has_a_retention(redis: Redis) -> None:
    await Producer(redis, KEY, max_bytes=1 << 20, retention_s=60).append(b"limited")
    assert 0 < await redis.pttl(KEY) <= 60_000

    await producer(redis).append(b"kept")

    assert await redis.pttl(KEY) == -1, "XADD alone would leave the expiry"
    assert await redis.xlen(KEY) == 2


async def test_the_age_of_entries_follows_the_clock_of_redis(redis: Redis) -> None:
    """As a pod does whose clock is years ahead or behind: it has no part in this."""
    sender = Producer(redis, KEY, max_bytes=1 << 20, retention_s=60)
    await sender.append(b"first")
    (first,) = await ids(redis)
    await redis.xadd(KEY, {"t": b"of a fast clock"}, id=f"{first + 59_000}-0")
    await sender.append(b"second")
    assert await redis.xlen(KEY) == 3
    await redis.xadd(KEY, {"t": b"of a faster one"}, id=f"{first + 121_000}-0")
    await sender.append(b"third")
    await sender.append(b"fourth")
    assert await ids(redis) == [first + 121_000] * 3


async def ids(redis: Redis) -> list[int]:
    rows: Any = await redis.xrange(KEY)
    return [int(id_.partition(b"-")[0]) for id_, _ in rows]


async def test_an_entry_is_added_once_by_a_user_that_may_not_limit_the_stream(
    redis: Redis, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await run(redis, "ACL", "SETUSER", "old", "reset", "on", ">secret", "~*", "+xadd", "+select", "+xtrim")
    old = connect(redis_url.replace("://", "://old:secret@"))
    async with old:
        for retention_s in (60, None):
            sender = Producer(old, KEY, max_bytes=1 << 20, retention_s=retention_s)
            for _ in range(3):
                assert await sender.append(b"trace") == 0
    await run(redis, "ACL", "DELUSER", "old")

    assert await redis.xlen(KEY) == 6
    complaints = [record for record in caplog.records if "refuses to limit" in record.message]
    assert ["pexpire" in str(vars(record)["error"]).lower() for record in complaints] == [True, False]


async def test_entries_arrive_in_order_whatever_their_bytes(redis: Redis) -> None:
    await append(redis, b"one", b"", bytes(range(256)))
    life = await consumer(redis)
    entries = await read(life)
    assert data(entries) == [b"one", b"", bytes(range(256))]
    assert [entry.deliveries for entry in entries] == [1, 1, 1]
    await settle_all(life)


async def test_a_stream_is_as_full_as_what_waits_in_it_and_is_in_nobodys_hand(redis: Redis) -> None:
    life = await consumer(redis)
    assert await life.fullness(4000) == 0.0
    await append(redis, *[bytes(936)] * 10)  # 1,000 bytes in Redis
    entries = await read(life, count=4)
    assert await life.fullness(4000) == pytest.approx(6 / 4)
    await life.ack(entry.id for entry in entries)
    assert await life.fullness(8000) == pytest.approx(6 / 8)
    await read(life)
    assert await life.fullness(8000) == 0.0
    await settle_all(life)


async def test_redis_tells_how_much_memory_it_may_use(redis: Redis) -> None:
    before = await max_memory(redis)
    try:
        await redis.config_set("maxmemory", 10**9)
        assert await max_memory(redis) == 10**9
        await redis.config_set("maxmemory", 0)
        assert await max_memory(redis) == 0
    finally:
        await redis.config_set("maxmemory", before)


async def test_a_redis_that_does_not_tell_a_user_its_memory_says_so(redis: Redis, redis_url: str) -> None:
    await redis.acl_setuser("trainer", enabled=True, passwords=["+x"], keys=["*"], categories=["+stream"])
    separator = "&" if "?" in redis_url else "?"
    try:
        async with connect(f"{redis_url}{separator}username=trainer&password=x") as client:
            with pytest.raises(UpdraftError, match="no permissions"):
                await max_memory(client)
    finally:
        await redis.acl_deluser("trainer")


async def test_what_is_acknowledged_leaves_the_group_and_the_stream(redis: Redis) -> None:
    await append(redis, b"one", b"two")
    life = await consumer(redis)
    first, second = await read(life)
    await life.ack([first.id])
    assert life.in_hand == {second.id}
    assert await redis.xlen(KEY) == 1
    await life.ack([second.id])
    await life.ack([])
    assert await redis.xlen(KEY) == 0
    assert await read(await consumer(redis)) == []


async def test_what_is_in_hand_is_not_delivered_again_to_the_same_life(redis: Redis) -> None:
    await append(redis, b"one")
    life = await consumer(redis, claim_idle=NOW)
    assert data(await read(life)) == [b"one"]
    await append(redis, b"two")
    assert data(await read(life)) == [b"two"]
    assert await read(life) == []
    await settle_all(life)


async def test_a_restart_brings_back_what_was_not_acknowledged_before_anything_new(redis: Redis) -> None:
    await append(redis, b"one", b"two", b"three")
    crashed = await consumer(redis)
    first = (await read(crashed))[0]
    await crashed.ack([first.id])
    await append(redis, b"four")
    life = await consumer(redis)
    assert [(entry.data, entry.deliveries) for entry in await read(life)] == [(b"two", 2), (b"three", 2)]
    assert [(entry.data, entry.deliveries) for entry in await read(life)] == [(b"four", 1)]
    await settle_all(life)


async def test_a_restart_brings_back_more_than_fits_one_page_or_one_read(redis: Redis) -> None:
    wanted = [b"%d" % i for i in range(700)]
    await append(redis, *wanted)
    assert len(await read(await consumer(redis), count=700)) == 700
    life = await consumer(redis)
    received: list[bytes] = []
    while entries := await read(life, count=99):
        received += data(entries)
    assert received == wanted
    await settle_all(life)


async def test_entries_of_a_consumer_that_went_silent_are_taken_over(redis: Redis) -> None:
    await append(redis, b"one", b"two")
    await read(await consumer(redis, "trainer-0"))
    life = await consumer(redis, "trainer-1", claim_idle=NOW)
    assert [(entry.data, entry.deliveries) for entry in await read(life)] == [(b"one", 2), (b"two", 2)]
    await settle_all(life)


async def test_entries_of_a_consumer_that_was_heard_lately_are_left_alone(redis: Redis) -> None:
    await append(redis, b"one")
    other = await consumer(redis, "trainer-0")
    await read(other)
    assert await read(await consumer(redis, "trainer-1", claim_idle=LATER)) == []
    await settle_all(other)


async def test_reading_on_keeps_others_from_taking_over_what_is_in_hand(redis: Redis) -> None:
    await append(redis, b"one")
    slow = await consumer(redis, "trainer-0", claim_idle=NOW)  # so that every read renews
    (entry,) = await read(slow)
    # As if it had been in hand for an hour.
    await redis.xclaim(KEY, "trainer", "trainer-0", 0, [entry.id], idle=3_600_000, justid=True)
    assert await read(slow) == []
    assert await read(await consumer(redis, "trainer-1", claim_idle=timedelta(minutes=30))) == []
    (row,) = await redis.xpending_range(KEY, "trainer", min="-", max="+", count=1)
    assert row["times_delivered"] == 1
    await settle_all(slow)


async def test_a_read_that_was_cut_off_loses_nothing(redis: Redis) -> None:
    life = await consumer(redis)
    assert await read(life) == []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await life.read(count=1, block=timedelta(seconds=10))
    await append(redis, b"one")
    # What the server does when the answer to that read goes astray.
    await redis.xreadgroup("trainer", "trainer-0", {KEY: ">"})
    assert data(await read(life)) == [b"one"]
    await settle_all(life)


async def test_a_blocked_read_returns_when_an_entry_arrives(redis: Redis) -> None:
    life = await consumer(redis)
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(life.read(count=1, block=timedelta(seconds=30)))
        await until(lambda: is_blocked(redis), what="a blocked client")
        await append(redis, b"one")
    assert data(reading.result()) == [b"one"]
    await settle_all(life)


async def test_a_read_blocks_no_longer_than_told_and_longer_than_one_slice(redis: Redis) -> None:
    life = await consumer(redis)
    loop = asyncio.get_running_loop()
    start = loop.time()
    async with asyncio.timeout(LONG_S):
        assert await life.read(count=1, block=timedelta(seconds=1.2)) == []
    assert loop.time() - start > 1.1


@pytest.mark.attack(
    boundary="traces",
    attack="an entry that crashes the trainer each time",
    outcome="a dead letter after five deliveries",
)
async def test_what_cannot_be_handled_becomes_a_dead_letter(redis: Redis) -> None:
    await append(redis, b"poison", b"fine")
    for life_number in (1, 2, 3):
        life = await consumer(redis, max_deliveries=3)
        entries = await read(life)
        assert [entry.deliveries for entry in entries] == [life_number] * 2
    life = await consumer(redis, max_deliveries=3)
    assert await read(life) == []
    assert life.dead_letters_total == 2
    assert await redis.xlen(KEY) == 0
    letters = await dead_letters(redis)
    assert [letter[b"t"] for letter in letters] == [b"poison", b"fine"]
    assert letters[0][b"reason"] == b"not handled in 3 deliveries"
    assert letters[0][b"id"].decode() == entries[0].id


async def test_poison_does_not_hide_the_entries_behind_it(redis: Redis) -> None:
    await append(redis, *[b"poison"] * 5)
    await read(await consumer(redis))
    await append(redis, b"fine")
    await read(await consumer(redis), count=5)
    life = await consumer(redis, max_deliveries=1)
    assert data(await read(life, count=2)) == [b"fine"]
    assert life.dead_letters_total == 5
    await settle_all(life)


async def test_a_reader_can_set_an_entry_aside_with_its_own_reason(redis: Redis) -> None:
    await append(redis, b"odd")
    life = await consumer(redis)
    (entry,) = await read(life)
    await life.dead_letter(entry, "no such target")
    assert life.in_hand == frozenset()
    (letter,) = await dead_letters(redis)
    assert letter == {
        b"t": b"odd",
        b"reason": b"no such target",
        b"id": entry.id.encode(),
        b"deliveries": b"1",
    }


async def test_a_letter_is_kept_once_by_a_user_that_may_not_limit_its_age(
    redis: Redis, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await append(redis, b"odd")
    await run(redis, "ACL", "SETUSER", "old", "reset", "on", ">secret", "~*", "+@all", "-pexpire")
    async with connect(redis_url.replace("://", "://old:secret@")) as old:
        life = Consumer(
            old, KEY, group="trainer", name="me", claim_idle=timedelta(seconds=60), max_deliveries=3, retention_s=60
        )
        await life.open()
        (entry,) = await read(life)
        await life.dead_letter(entry, "no such target")
    await run(redis, "ACL", "DELUSER", "old")

    assert len(await dead_letters(redis)) == 1
    assert await redis.xlen(KEY) == 0
    assert "refuses to limit dead letters" in caplog.text


@pytest.mark.attack(boundary="traces", attack="ever more dead letters", outcome="the stream of dead letters is bounded")
async def test_dead_letters_are_bounded(redis: Redis) -> None:
    large = Producer(redis, KEY, max_bytes=1 << 30)
    life = await consumer(redis)
    for _ in range(24):
        await large.append(bytes(1 << 20))
        (entry,) = await read(life)
        await life.dead_letter(entry, "too much")
    assert 14 <= await redis.xlen(DEAD) <= 17


async def test_a_lost_group_is_made_again_and_reads_from_the_start(redis: Redis) -> None:
    life = await consumer(redis)
    assert await read(life) == []
    await redis.flushall()
    await append(redis, b"one")
    assert data(await read(life)) == [b"one"]
    await settle_all(life)


async def test_a_group_lost_while_its_reader_waits_is_made_again(redis: Redis) -> None:
    life = await consumer(redis)
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(life.read(count=1, block=timedelta(seconds=30)))
        await until(lambda: is_blocked(redis), what="a blocked client")
        await redis.delete(KEY)
        await append(redis, b"one")
    assert data(reading.result()) == [b"one"]
    await settle_all(life)


async def test_what_is_in_hand_survives_the_loss_of_the_group_only_once(redis: Redis) -> None:
    await append(redis, b"one", b"two")
    life = await consumer(redis)
    (first,) = await read(life, count=1)
    await redis.xgroup_destroy(KEY, "trainer")
    assert data(await read(life)) == [b"two"]
    await life.ack([first.id])
    await settle_all(life)
    assert await redis.xlen(KEY) == 0


async def test_pending_entries_that_the_bound_deleted_are_counted_as_lost(redis: Redis) -> None:
    await append(redis, b"one", b"two", b"three")
    await read(await consumer(redis))
    await redis.xtrim(KEY, maxlen=1, approximate=False)
    life = await consumer(redis)
    assert data(await read(life)) == [b"three"]
    assert life.lost_total == 2
    await settle_all(life)


async def test_acknowledging_what_is_gone_is_no_error(redis: Redis) -> None:
    await append(redis, b"one")
    life = await consumer(redis)
    (entry,) = await read(life)
    await redis.flushall()
    await life.ack([entry.id])
    assert life.in_hand == frozenset()


async def test_a_stream_stays_within_its_bytes_and_every_drop_is_counted(redis: Redis) -> None:
    sender = producer(redis, max_bytes=100_000)
    dropped = 0
    for _ in range(500):
        dropped += await sender.append(bytes(1000))
    length = await redis.xlen(KEY)
    assert dropped + length == 500
    assert 90 <= length <= 110
    assert await num_bytes(redis) < 130_000


async def test_a_stream_adapts_when_entries_grow(redis: Redis) -> None:
    sender = producer(redis, max_bytes=1_000_000)
    for _ in range(2000):
        await sender.append(bytes(100))
    for _ in range(500):
        await sender.append(bytes(20_000))
    assert await num_bytes(redis) < 1_300_000


async def test_at_least_the_newest_entry_stays(redis: Redis) -> None:
    sender = producer(redis, max_bytes=5000)
    await sender.append(bytes(5000))
    assert await sender.append(bytes(5000)) == 1
    assert await redis.xlen(KEY) == 1


async def test_shards_share_the_bytes_and_say_how_large_an_entry_may_be(redis: Redis) -> None:
    sender = ShardedProducer(redis, [f"{KEY}:{number}" for number in range(4)], max_bytes=4000)
    assert sender.max_entry_bytes == 1000
    await sender.append(b"id", bytes(1000))
    with pytest.raises(InvalidInput, match="exceeds the limit, 1000"):
        await sender.append(b"id", bytes(1001))


async def test_an_entry_beyond_the_limit_is_refused(redis: Redis) -> None:
    with pytest.raises(InvalidInput, match="2000 bytes exceeds the limit, 1000"):
        await producer(redis, max_bytes=1000).append(bytes(2000))
    assert await redis.exists(KEY) == 0


@pytest.mark.attack(
    boundary="redis",
    attack="reading a prompt from an error message",
    outcome="errors do not contain it",
)
async def test_a_refusal_of_redis_does_not_repeat_the_users_data(redis: Redis) -> None:
    await redis.set(KEY, "no stream")
    with pytest.raises(UpdraftError, match="WRONGTYPE") as refused:
        await producer(redis).append(b"private")
    assert "private" not in str(refused.value)


async def dead_letters(redis: Redis) -> list[dict[bytes, bytes]]:
    rows: Any = await redis.xrange(DEAD)
    return [fields for _, fields in rows]


async def num_bytes(redis: Redis) -> int:
    return await redis.memory_usage(KEY, samples=0) or 0


async def is_blocked(redis: Redis) -> bool:
    return bool((await redis.info("clients"))["blocked_clients"])


async def test_a_large_entry_arrives_whole_though_it_is_sent_in_pieces(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, written = bytes(range(256)) * 12_345, list[int]()
    write = asyncio.StreamWriter.write

    def measured(writer: asyncio.StreamWriter, piece: bytes) -> None:
        written.append(len(piece))
        write(writer, piece)

    monkeypatch.setattr(asyncio.StreamWriter, "write", measured)
    await producer(redis, max_bytes=8 << 20).append(entry)
    life = await consumer(redis)
    assert data(await read(life)) == [entry]
    assert sum(written) > len(entry)
    assert max(written) <= 128 * 1024
    await settle_all(life)


@pytest.mark.parametrize("size", [0, 1, 128 * 1024, 128 * 1024 + 1, 3_000_001])
async def test_entries_of_all_sizes_arrive_as_they_were_sent(redis: Redis, size: int) -> None:
    entries = [random.Random(number).randbytes(size) for number in range(3)]
    life = await consumer(redis)
    for entry in entries:
        await producer(redis, max_bytes=16 << 20).append(entry)
    assert data(await read(life, count=3)) == entries
    await settle_all(life)


@pytest.mark.attack(
    boundary="redis",
    attack="a prompt with Redis commands, on a connection that breaks in the middle",
    outcome="it is never run",
)
async def test_the_text_of_an_entry_whose_connection_is_closed_half_way_is_never_a_command(
    short_tmp_path: Path,
) -> None:
    entry = b"\r\nSET leaked 1\r\n" * 250_000
    with RedisServer(short_tmp_path) as server:
        client = connect(server.url)
        assert isinstance(client, Redis)
        connection: Any = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        await connection.connect()
        server.pause()
        command = connection.pack_command("XADD", KEY, "*", "t", entry)

        async def is_half_sent() -> bool:
            return bool(connection._writer.transport.get_write_buffer_size())

        async def close() -> None:
            await until(is_half_sent, what="a full socket")
            await connection.disconnect(nowait=True)  # as a client of a cluster that has moved
            server.resume()

        with pytest.raises(RedisConnectionError):
            await asyncio.gather(connection.send_packed_command(command, check_health=False), close())
        assert await client.keys() == []
        await client.aclose()
