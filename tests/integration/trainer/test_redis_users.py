"""Each Redis user of a speculator, with the real code that uses it: it can do that, and nothing else."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError
from tests.support.redis_server import RedisServer, run
from tests.support.traces import TraceMaker
from tests.support.trainer import is_settled

from updraft_chassis import streams
from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import Unavailable, UpdraftError
from updraft_chassis.lifecycle import Stop
from updraft_chassis.streams.consumer import Consumer
from updraft_operator.manifests.redis_users import RedisUser, Role, hashed, rules, user_name, user_url
from updraft_trainer.coordination.lease import Lease
from updraft_trainer.data.intake import Intake
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import Pool, ReplayLimits
from updraft_trainer.metrics import Metrics

NAMESPACE, OTHERS = "6f1c:team", "6f1c:others"
"""Of stream keys."""
NAME = "chat"
PASSWORD = 64 * "a"
KEYS, THEIRS = streams.keys(NAMESPACE, NAME, 2), streams.keys(OTHERS, NAME, 1)[0]
LEASE = streams.lease_key(NAMESPACE, NAME)

REFUSED = (
    *(
        "KEYS *",
        "SCAN 0",
        "RANDOMKEY",
        "DBSIZE",
        "INFO",
        "INFO memory",
        "CONFIG GET maxmemory",
        "CONFIG SET maxmemory 1",
    ),
    *("ACL LIST", "ACL WHOAMI", "ACL SETUSER other on", "ACL GETUSER default", "CLIENT LIST", "CLIENT KILL 1.2.3.4:5"),
    *("MONITOR", "SLOWLOG GET", "FLUSHALL", "FLUSHDB", "SHUTDOWN", "BGREWRITEAOF", "SAVE", "REPLICAOF NO ONE"),
    *(
        "EVAL return(1) 0",
        "SCRIPT FLUSH",
        "SUBSCRIBE c",
        "PUBLISH c x",
        "CLUSTER NODES",
        "MEMORY STATS",
        "LATENCY DOCTOR",
    ),
    *("WAIT 0 0", "MODULE LIST", "SWAPDB 0 1", "MULTI", "OBJECT ENCODING x", f"DUMP {KEYS[0]}", f"RENAME {KEYS[0]} x"),
)
"""Commands that neither role may run, whatever their keys are."""


@dataclass(frozen=True, slots=True)
class Users:
    """Clients of one Redis: its administrator, and both users of a speculator."""

    admin: Redis
    writer: Redis
    reader: Redis

    def of(self, role: Role) -> Redis:
        return self.writer if role is Role.WRITER else self.reader


@pytest.fixture
async def users(redis: Redis, redis_server: RedisServer) -> AsyncIterator[Users]:
    async with AsyncExitStack() as stack:
        clients = []
        for role in Role:
            name = user_name("6f1c", "team", NAME, role)
            user = RedisUser(name=name, rules=rules(role, NAMESPACE, NAME), password_hash=hashed(PASSWORD))
            await run(redis, "ACL", "SETUSER", name, *user.words())
            client = await stack.enter_async_context(streams.connect(user_url(redis_server.url, name, PASSWORD)))
            assert isinstance(client, Redis)
            clients.append(client)
        await run(redis, "ACL", "LOG", "RESET")
        yield Users(redis, *clients)
        await run(redis, "ACL", "DELUSER", *(user_name("6f1c", "team", NAME, role) for role in Role))


@asynccontextmanager
async def intake(client: Redis, folder: Path, traces: TraceMaker) -> AsyncIterator[Replay]:
    """The trainer's, of the first shard."""
    limits = ReplayLimits.of(10 * 1024**2)
    with Replay.open(folder, limits=limits, expected=traces.expected, cache_bytes=1024**2) as replay:
        consumer = Consumer(client, KEYS[0], group="trainer", name="trainer-0", claim_idle=timedelta(hours=1))
        await consumer.open()
        task = Intake(
            consumer, replay, traces.expected, metrics=Metrics(CollectorRegistry()), clock=SystemClock(), shard=0
        )
        yield replay
        while not await is_settled(client, KEYS[0]):
            await task.store_batch()
        assert await task.storable(1024**2) > 0


async def test_pods_and_trainer_can_do_all_that_they_need(users: Users, traces: TraceMaker, tmp_path: Path) -> None:
    retention_s = {0: None, 1: 3600}
    producers = [
        streams.Producer(users.writer, KEYS[0], max_bytes=64 * 1024**2, retention_s=retention_s[n % 2])
        for n in range(2)
    ]
    for seed in range(12):
        await producers[seed % 2].append(traces.data(seed))
    producer = producers[0]
    await producer.append(b"not a trace")
    async with intake(users.reader, tmp_path / "replay", traces) as replay:
        pass
    assert replay.num_samples(Pool.WINDOW) == 12
    assert await users.admin.xlen(f"{KEYS[0]}:dead") == 1
    assert await streams.unowned_shards(users.reader, NAMESPACE, NAME, 1) == []
    await streams.delete(users.reader, NAMESPACE, NAME)
    assert await users.admin.keys() == []
    assert await _denied(users.admin) == set()


async def test_a_trainer_takes_over_what_a_dead_one_left(users: Users) -> None:
    producer = streams.Producer(users.writer, KEYS[0], max_bytes=1024**2)
    for number in range(3):
        await producer.append(b"trace %d" % number)
    first, second = (
        Consumer(users.reader, KEYS[0], group="trainer", name=name, claim_idle=timedelta(0))
        for name in ("first", "second")
    )
    await first.open()
    await first.open()
    assert len(await first.read(count=3, block=timedelta(0))) == 3
    await users.admin.xtrim(KEYS[0], maxlen=2, approximate=False)
    entries = await second.read(count=3, block=timedelta(0))
    await second.ack(entry.id for entry in entries)
    assert (len(entries), second.lost_total) == (2, 1)
    assert await _denied(users.admin) == set()


async def test_a_trainer_makes_room_for_its_group_in_a_full_redis(users: Users) -> None:
    producer = streams.Producer(users.writer, KEYS[0], max_bytes=1024**2)
    for _ in range(3):
        await producer.append(b"trace")
    consumer = Consumer(users.reader, KEYS[0], group="trainer", name="first", claim_idle=timedelta(hours=1))
    await users.admin.config_set("maxmemory", 1)
    try:
        with pytest.raises(UpdraftError, match="maxmemory"):
            await consumer.open()
    finally:
        await users.admin.config_set("maxmemory", 0)
    assert consumer.lost_total == 1
    assert await _denied(users.admin) == set()


async def test_a_trainer_takes_renews_and_releases_its_lease(users: Users) -> None:
    lease = Lease(users.reader, LEASE, "first", holder_id="1", duration_s=30.0, clock=SystemClock())
    await lease.wait(Stop())
    assert await lease.take() == "first"
    await lease.release()
    assert await users.admin.exists(LEASE) == 0
    assert await _denied(users.admin) == set()


@pytest.mark.attack(
    boundary="redis",
    attack="some 40 commands that list keys and users, read settings, run scripts or stop the server",
    outcome="refused for both users",
)
@pytest.mark.parametrize("role", Role)
async def test_no_user_learns_of_others_or_changes_the_server(users: Users, role: Role) -> None:
    for command in REFUSED:
        with pytest.raises(NoPermissionError):
            await run(users.of(role), *command.split())


@pytest.mark.attack(boundary="redis", attack="reading or writing the streams of another resource", outcome="refused")
@pytest.mark.parametrize("key", [THEIRS, "updraft:{6f1c:team:chat-2:0}:samples:v1", "any"])
@pytest.mark.parametrize(("role", "command"), [(Role.WRITER, "XADD KEY * t x"), (Role.READER, "XRANGE KEY - +")])
async def test_no_user_reaches_the_keys_of_others(users: Users, role: Role, command: str, key: str) -> None:
    await users.admin.xadd(THEIRS, {"t": "a person's words"})
    with pytest.raises(NoPermissionError):
        await run(users.of(role), *command.replace("KEY", key).split())


@pytest.mark.attack(
    boundary="redis",
    attack="a serving pod that reads prompts, dead letters or the trainer's lease",
    outcome="refused: it can only add traces, and remove old ones",
)
async def test_pods_read_nothing_and_write_nothing_but_traces(users: Users) -> None:
    for command in (
        *(f"XRANGE {KEYS[0]} - +", f"XREAD STREAMS {KEYS[0]} 0", f"XLEN {KEYS[0]}", f"XDEL {KEYS[0]} 1-1"),
        *(f"UNLINK {KEYS[0]}", f"DEL {KEYS[0]}", f"XINFO STREAM {KEYS[0]}", f"XGROUP CREATE {KEYS[0]} g 0"),
        *(f"XADD {KEYS[0]}:dead * t x", f"XADD {LEASE} * t x", f"SET {LEASE} x", f"GET {LEASE}"),
    ):
        with pytest.raises(NoPermissionError):
            await run(users.writer, *command.split())


@pytest.mark.attack(boundary="redis", attack="a guessed password", outcome="refused")
async def test_a_wrong_password_opens_nothing(users: Users, redis_server: RedisServer) -> None:
    url = user_url(redis_server.url, user_name("6f1c", "team", NAME, Role.WRITER), 64 * "b")
    async with streams.connect(url) as stranger:
        with pytest.raises(Unavailable, match="invalid username-password pair"):
            await streams.Producer(stranger, KEYS[0], max_bytes=1024).append(b"trace")


async def _denied(admin: Redis) -> set[str]:
    """Commands that were refused since the fixture, except what the client says of itself, whose refusal it ignores."""
    return {str(entry["object"]) for entry in await admin.acl_log()} - {"client", "client|setinfo"}
