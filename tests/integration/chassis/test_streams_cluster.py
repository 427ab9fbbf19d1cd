"""Streams over a real Redis Cluster of three nodes, and over TLS."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from redis.crc import key_slot
from tests.support.certificates import Authority
from tests.support.ports import free_port
from tests.support.redis_cluster import BUS, SLOTS, Encryption, Node, bus_port, redis_cluster, started
from tests.support.redis_server import RedisServer
from tests.support.wait import LONG_S, until

from updraft_chassis import streams
from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_chassis.streams import Client, ShardedProducer, shard_of
from updraft_chassis.streams.consumer import Consumer

NOW = timedelta()
NUM_SHARDS = 6
KEYS = streams.keys("test", "chat", NUM_SHARDS)
IDS = [number.to_bytes(16) for number in range(60)]


@pytest.fixture
def nodes(short_tmp_path: Path) -> Iterator[list[Node]]:
    with redis_cluster(short_tmp_path) as made:
        yield made


@pytest.fixture
def encrypted(short_tmp_path: Path, tls_redis_server: Path) -> Iterator[list[Node]]:
    tls = Encryption(program=tls_redis_server, authority=Authority(short_tmp_path / "tls"))
    with redis_cluster(short_tmp_path, tls) as made:
        yield made


def test_a_node_whose_port_was_taken_meanwhile_gets_another(
    short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, free = bus_port(), bus_port()
    ports = iter([taken, free])
    monkeypatch.setattr("tests.support.redis_cluster.bus_port", lambda: next(ports))
    with socket.create_server(("127.0.0.1", taken + BUS)), ExitStack() as stack:
        assert started(short_tmp_path, stack).port == free


def consumers(client: Client) -> list[Consumer]:
    return [
        Consumer(client, key, group="trainer", name="trainer-0", claim_idle=timedelta(hours=1), max_deliveries=1)
        for key in KEYS
    ]


async def read_all(readers: list[Consumer]) -> list[list[bytes]]:
    """The entries of each shard, acknowledged."""
    found = []
    for reader in readers:
        entries = await reader.read(count=100, block=NOW)
        await reader.ack(entry.id for entry in entries)
        found.append([bytes(entry.data) for entry in entries])
    return found


@pytest.mark.parametrize("kind", ["nodes", "encrypted"])
async def test_traces_are_in_the_stream_of_their_shard_wherever_in_the_cluster_that_is(
    kind: str, request: pytest.FixtureRequest
) -> None:
    nodes: list[Node] = request.getfixturevalue(kind)
    async with streams.connect(nodes[1].url) as client:
        producer = ShardedProducer(client, KEYS, max_bytes=1 << 20)
        for trace_id in IDS:
            await producer.append(trace_id, trace_id)
        assert all(node.call("DBSIZE") for node in nodes), "every node has a shard"
        found = await read_all(consumers(client))
        assert found == [[id_ for id_ in IDS if shard_of(id_, NUM_SHARDS) == shard] for shard in range(NUM_SHARDS)]
        assert await read_all(consumers(client)) == [[]] * NUM_SHARDS
        await streams.delete(client, "test", "chat")
        assert [node.call("DBSIZE") for node in nodes] == [0, 0, 0]


@pytest.mark.attack(
    boundary="redis",
    attack="plaintext to a Redis Cluster with TLS, or a node with a certificate of another CA",
    outcome="nothing is answered, and clients do not believe it",
)
async def test_nothing_of_an_encrypted_cluster_answers_plaintext_or_who_knows_another_authority(
    encrypted: list[Node], tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other")
    async with streams.connect(encrypted[0].url) as client:
        await ShardedProducer(client, KEYS, max_bytes=1 << 20).append(IDS[0], b"entry")
    for node in encrypted:
        for url in (
            f"redis+cluster://127.0.0.1:{node.port}",
            f"{node.url.partition('?')[0]}?ssl_ca_certs={other.file}",
        ):
            client = streams.connect(url)
            with pytest.raises(Unavailable):
                await ShardedProducer(client, KEYS, max_bytes=1 << 20).append(IDS[0], b"entry")
            await client.aclose()


async def test_a_cluster_has_the_memory_of_its_primaries_unless_one_has_no_limit(nodes: list[Node]) -> None:
    async with streams.connect(nodes[0].url) as client:
        for node in nodes:
            node.call("CONFIG", "SET", "maxmemory", 10**8)
        assert await streams.max_memory(client) == 3 * 10**8
        nodes[1].call("CONFIG", "SET", "maxmemory", 0)
        assert await streams.max_memory(client) == 0


async def test_a_letter_nobody_can_read_is_kept_beside_its_shard(nodes: list[Node]) -> None:
    async with streams.connect(nodes[0].url) as client:
        await ShardedProducer(client, KEYS, max_bytes=8 << 20).append(IDS[0], b"bad" * 123_456)
        reader = consumers(client)[shard_of(IDS[0], NUM_SHARDS)]
        (entry,) = await reader.read(count=1, block=NOW)
        assert isinstance(entry.data, memoryview)  # received in pieces
        await reader.dead_letter(entry, "unreadable")
        assert await client.xlen(f"{KEYS[shard_of(IDS[0], NUM_SHARDS)]}:dead") == 1


async def test_a_node_that_dies_and_comes_back_loses_nothing(nodes: list[Node]) -> None:
    async with streams.connect(nodes[0].url) as client:
        producer, readers = ShardedProducer(client, KEYS, max_bytes=1 << 20), consumers(client)
        for trace_id in IDS[:30]:
            await producer.append(trace_id, trace_id)
        await asyncio.to_thread(nodes[2].server.kill)
        last_slots = range(SLOTS * 2 // 3, SLOTS)
        dead = next(id_ for id_ in IDS if key_slot(KEYS[shard_of(id_, NUM_SHARDS)].encode()) in last_slots)
        with pytest.raises(Unavailable):
            await producer.append(dead, dead)
        await asyncio.to_thread(nodes[2].server.start)

        async def is_stored(trace_id: bytes) -> bool:
            try:
                await producer.append(trace_id, trace_id)
            except Unavailable:
                return False
            return True

        for trace_id in IDS[30:]:
            await until(lambda trace_id=trace_id: is_stored(trace_id), what="a node's return", timeout_s=LONG_S)  # type: ignore[misc] # a default
        found = {entry for entries in await read_all(readers) for entry in entries}
        assert found == set(IDS)


async def test_a_cluster_that_is_not_there_is_unavailable() -> None:
    client = streams.connect(f"redis+cluster://127.0.0.1:{free_port()}")
    with pytest.raises(Unavailable, match="Redis is unavailable"):
        await ShardedProducer(client, KEYS, max_bytes=1 << 20).append(IDS[0], b"entry")
    await client.aclose()


@asynccontextmanager
async def behind_tls(server: RedisServer, authority: Authority) -> AsyncIterator[int]:
    """The port at which that Redis is reached by TLS."""
    tls = authority.server()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.cert_file, tls.key_file)

    async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            target.write(data)
        target.close()

    async def link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        redis_reader, redis_writer = await asyncio.open_unix_connection(server.url.removeprefix("unix://"))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(forward(reader, redis_writer))
            tasks.create_task(forward(redis_reader, writer))

    async with await asyncio.start_server(link, "127.0.0.1", 0, ssl=context) as listener:
        yield listener.sockets[0].getsockname()[1]


async def test_streams_work_over_tls_with_the_authority_that_the_address_names(
    redis_server: RedisServer, redis_url: str, tmp_path: Path
) -> None:
    mine, other = Authority(tmp_path / "mine"), Authority(tmp_path / "other")
    async with behind_tls(redis_server, mine) as port:
        async with streams.connect(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={mine.file}") as client:
            await ShardedProducer(client, KEYS, max_bytes=1 << 20).append(IDS[0], b"entry")
            assert [entry for entries in await read_all(consumers(client)) for entry in entries] == [b"entry"]
        for wrong in (f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={other.file}", f"redis://127.0.0.1:{port}/0"):
            async with streams.connect(wrong) as client:
                with pytest.raises(Unavailable):
                    await ShardedProducer(client, KEYS, max_bytes=1 << 20).append(IDS[0], b"entry")


def test_an_address_of_a_cluster_that_is_none_is_told_without_its_password() -> None:
    with pytest.raises(InvalidInput, match="the Redis address is invalid") as refused:
        streams.connect("http+cluster://:secret@host")
    assert "secret" not in str(refused.value)
