"""The operator's users of a real Redis: made, repaired after whatever happens to them, and deleted with their speculator."""

import asyncio
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from tests.support.certificates import Authority
from tests.support.redis_cluster import Encryption, Node, redis_cluster
from tests.support.redis_server import RedisServer, run
from tests.support.wait import LONG_S, until

from updraft_chassis import streams
from updraft_chassis.errors import Unavailable
from updraft_operator.manifests.redis_users import RedisUser, Role, hashed, rules, user_name, user_url
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.watching import redis_users
from updraft_operator.watching.redis_users import RedisUsers

CHAT, CODE = Key("team", "chat"), Key("others", "code")
OF_ITSELF = {"client", "client|setinfo"}
"""Commands with which a client tells its name; it ignores that they are refused."""

OLD, NEW = 64 * "a", 64 * "b"


def user(key: Key, role: Role = Role.WRITER, password: str = OLD, *, keeps_former: bool = False) -> RedisUser:
    return RedisUser(
        name=user_name("6f1c", *key, role),
        rules=rules(role, f"6f1c:{key.namespace}", key.name),
        password_hash=hashed(password),
        keeps_former=keeps_former,
    )


class Operator:
    """What makes the users, around a set of the speculators that exist."""

    def __init__(self, url: str, period_s: float = 5.0) -> None:
        self.existing = {CHAT, CODE}
        self.leads = [True]
        """From now on, one answer after another; the last one stays."""
        self.notified: list[Key] = []
        self._collectors = CollectorRegistry()
        self.users = RedisUsers(
            lambda: url,
            "6f1c",
            period_s=period_s,
            may_write=lambda: self.leads.pop(0) if len(self.leads) > 1 else self.leads[0],
            is_gone=lambda key: key not in self.existing,
            notify=self.notified.append,
            metrics=Metrics(self._collectors),
        )

    @property
    def num_set(self) -> float:
        return self._collectors.get_sample_value("updraft_operator_redis_users_total", {"change": "set"}) or 0.0


async def names(redis: Redis) -> set[str]:
    return {name.decode() for name in await run(redis, "ACL", "USERS")} - {"default"}


async def has(redis: Redis, name: str) -> bool:
    return name in await names(redis)


async def can_append(url: str, key: Key, password: str = OLD) -> bool:
    """Whether a pod with this password adds a trace."""
    (stream,) = streams.keys(f"6f1c:{key.namespace}", key.name, 1)
    async with streams.connect(user_url(url, user(key).name, password)) as client:
        try:
            await streams.Producer(client, stream, max_bytes=1024).append(b"trace")
        except Unavailable:
            return False
    return True


@pytest.fixture
async def operator(redis: Redis, redis_server: RedisServer) -> Operator:
    for name in await names(redis):
        await run(redis, "ACL", "DELUSER", name)
    made = Operator(redis_server.url)
    for key in (CHAT, CODE):
        made.users.want(key, tuple(user(key, role) for role in Role))
    await made.users.repair()
    return made


async def test_users_are_made_once(operator: Operator, redis: Redis, redis_url: str) -> None:
    assert await names(redis) == {user(key, role).name for key in (CHAT, CODE) for role in Role}
    assert await can_append(redis_url, CHAT)
    assert not await can_append(redis_url, CHAT, NEW)
    await operator.users.repair()
    assert operator.num_set == 4
    assert operator.users.problem(CHAT) is None
    assert operator.notified == []


async def _tamper(redis: Redis, words: list[str]) -> None:
    if "(" in words[-1] and int((await redis.info("server"))["redis_version"].partition(".")[0]) < 7:
        pytest.skip("this Redis has no selectors")
    await run(redis, "ACL", *words)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["DELUSER", user(CHAT).name], id="deleted"),
        pytest.param(["SETUSER", user(CHAT).name, "off"], id="switched off"),
        pytest.param(["SETUSER", user(CHAT).name, "resetpass", ">weak"], id="another password"),
        pytest.param(["SETUSER", user(CHAT).name, ">weak"], id="one more password"),
        pytest.param(["SETUSER", user(CHAT).name, "nopass"], id="no password"),
        pytest.param(["SETUSER", user(CHAT).name, "allkeys"], id="more keys"),
        pytest.param(["SETUSER", user(CHAT).name, "+@all"], id="more commands"),
        pytest.param(["SETUSER", user(CHAT).name, "-xadd"], id="fewer commands"),
        pytest.param(["SETUSER", user(CHAT).name, "allchannels"], id="channels"),
        pytest.param(["SETUSER", user(CHAT).name, "skip-sanitize-payload"], id="payload"),
        pytest.param(["SETUSER", user(CHAT).name, "(~* +@all)"], id="selector"),
    ],
)
async def test_what_somebody_does_to_a_user_is_undone(
    operator: Operator, redis: Redis, redis_url: str, words: list[str]
) -> None:
    before = await run(redis, "ACL", "LIST")
    await _tamper(redis, words)
    await operator.users.repair()
    assert sorted(await run(redis, "ACL", "LIST")) == sorted(before)
    assert operator.num_set == 5
    assert await can_append(redis_url, CHAT)


async def test_a_new_process_makes_them_once_more_and_cuts_no_connection(redis_url: str, operator: Operator) -> None:
    (stream,) = streams.keys("6f1c:team", "chat", 1)
    async with streams.connect(user_url(redis_url, user(CHAT).name, OLD)) as client:
        producer = streams.Producer(client, stream, max_bytes=1024)
        await producer.append(b"before")
        successor = Operator(redis_url)
        successor.users.want(CHAT, (user(CHAT), user(CHAT, Role.READER)))
        await successor.users.repair()
        await producer.append(b"after")
    assert successor.num_set == 2
    assert await can_append(redis_url, CODE), "nobody has asked for it yet, but it exists"
    assert operator.num_set == 4


async def test_a_password_is_changed_with_an_overlap(operator: Operator, redis_url: str) -> None:
    operator.users.want(CHAT, (user(CHAT, password=NEW, keeps_former=True),))
    await operator.users.repair()
    assert await can_append(redis_url, CHAT, OLD)
    assert await can_append(redis_url, CHAT, NEW)
    operator.users.want(CHAT, (user(CHAT, password=NEW),))
    await operator.users.repair()
    assert not await can_append(redis_url, CHAT, OLD)
    assert await can_append(redis_url, CHAT, NEW)


async def test_a_user_stays_as_it_is_while_its_secret_cannot_be_written(
    operator: Operator, redis: Redis, redis_url: str
) -> None:
    operator.users.want(CHAT, tuple(replace(user(CHAT, role), password_hash="") for role in Role))
    operator.users.want(CODE, (replace(user(CODE), password_hash=""),))
    await run(redis, "ACL", "DELUSER", user(CODE).name)
    await operator.users.repair()
    assert await can_append(redis_url, CHAT)
    assert await names(redis) == {user(CHAT, role).name for role in Role}, "a user without a password is not made"
    assert operator.users.problem(CHAT) is None


async def test_a_leader_that_comes_back_makes_no_users_for_what_is_gone(operator: Operator, redis: Redis) -> None:
    operator.leads = [False]
    operator.users.start_over()
    operator.existing.remove(CODE)  # nobody tells this replica
    operator.leads = [True]
    operator.users.start_over()
    operator.users.want(CHAT, (user(CHAT),))
    await operator.users.repair()
    assert await names(redis) == {user(CHAT).name}


async def test_a_leader_that_loses_its_lease_changes_no_further_user(operator: Operator, redis: Redis) -> None:
    for name in await names(redis):
        await run(redis, "ACL", "DELUSER", name)
    left_over = user(Key("team", "gone")).name
    await run(redis, "ACL", "SETUSER", left_over)
    operator.leads = [True, False]
    await operator.users.repair()
    assert len(await names(redis) - {left_over}) == 1
    assert await has(redis, left_over)
    assert operator.users.problem(CHAT) is None, "it says nothing about Redis"
    await run(redis, "ACL", "DELUSER", left_over)


async def test_users_of_what_is_gone_are_deleted_and_others_left_alone(operator: Operator, redis: Redis) -> None:
    others = {"somebody", "updraft.another.team.gone.writer", "updraft.6f1c.team.gone.admin"}
    left_over = user(Key("team", "gone")).name
    for name in (*others, left_over):
        await run(redis, "ACL", "SETUSER", name)
    operator.existing.remove(CODE)
    operator.users.forget(CODE)
    operator.users.want(CHAT, ())
    await operator.users.repair()
    assert await names(redis) == others
    for name in others:
        await run(redis, "ACL", "DELUSER", name)


@pytest.mark.attack(
    boundary="redis",
    attack="deleting the users of all resources",
    outcome="the operator makes them again",
)
async def test_a_redis_that_forgot_its_users_gets_them_again(short_tmp_path: Path) -> None:
    with RedisServer(short_tmp_path) as server:
        operator = Operator(server.url)
        operator.users.want(CHAT, (user(CHAT), user(CHAT, Role.READER)))
        await operator.users.repair()
        server.kill()
        await operator.users.repair()
        assert operator.users.problem(CHAT) is None, "they were right when it was last there"
        server.start()
        assert not await can_append(server.url, CHAT)
        await operator.users.repair()
        assert await can_append(server.url, CHAT)


@pytest.mark.parametrize("kind", ["plain", "TLS"])
async def test_every_node_of_a_cluster_has_the_users_and_gets_them_again(
    short_tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    tls = _encryption(short_tmp_path, request) if kind == "TLS" else None
    keys = streams.keys("6f1c:team", "chat", 6)
    reader = user(CHAT, Role.READER)
    with redis_cluster(short_tmp_path, tls) as nodes:
        operator = Operator(nodes[0].url)
        operator.users.want(CHAT, (user(CHAT), reader))
        await operator.users.repair()
        assert operator.num_set == 6
        async with (
            streams.connect(user_url(nodes[1].url, user(CHAT).name, OLD)) as pods,
            streams.connect(user_url(nodes[2].url, reader.name, OLD)) as trainer,
        ):
            producer = streams.ShardedProducer(pods, keys, max_bytes=1 << 20)
            for number in range(30):
                await producer.append(bytes([number]), b"trace")
            assert all(node.call("DBSIZE") for node in nodes), "every node has a shard"
            assert await streams.unowned_shards(trainer, "6f1c:team", "chat", 6) == []
            await streams.delete(trainer, "6f1c:team", "chat")
        assert all(entry["object"] in OF_ITSELF for node in nodes for entry in acl_log(node))
        nodes[2].server.kill()
        nodes[2].server.start()

        async def is_repaired() -> bool:
            await operator.users.repair()
            return operator.num_set == 8

        await until(is_repaired, what="the users of the third node", timeout_s=LONG_S)


def _encryption(folder: Path, request: pytest.FixtureRequest) -> Encryption:
    """Skips the test without a redis-server that has TLS."""
    program: Path = request.getfixturevalue("tls_redis_server")
    return Encryption(program=program, authority=Authority(folder / "tls"))


async def test_users_are_made_as_soon_as_they_are_wanted(redis: Redis, redis_server: RedisServer) -> None:
    operator = Operator(redis_server.url, period_s=300.0)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(operator.users.run())
        for key in (CHAT, CODE):
            operator.users.want(key, (user(key),))
            await until(lambda key=key: has(redis, user(key).name), what="its user")  # type: ignore[misc] # a default
        operator.users.close()


def acl_log(node: Node) -> list[dict[str, Any]]:
    """What the node refused."""
    entries: Any = node.call("ACL LOG")
    return list(entries)


async def test_a_redis_that_is_away_is_a_problem_until_it_is_there(short_tmp_path: Path) -> None:
    server = RedisServer(short_tmp_path)
    operator = Operator(server.url)
    operator.users.want(CHAT, (user(CHAT),))
    await operator.users.repair()
    problem = operator.users.problem(CHAT)
    assert problem is not None
    assert problem.reason == "RedisUnreachable"
    assert "its Redis does not answer" in problem.message
    with server:
        await operator.users.repair()
    assert operator.users.problem(CHAT) is None
    assert operator.notified == [CHAT, CHAT]
    assert operator.users.problem(CODE) is None, "it wants none"


async def test_a_redis_that_refuses_users_is_a_problem(
    redis: Redis, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await run(redis, "ACL", "SETUSER", "limited", "on", ">secret", "allkeys", "+@all", "-acl")
    operator = Operator(user_url(redis_url, "limited", "secret"))
    operator.users.want(CHAT, (user(CHAT),))
    for _ in range(2):
        await operator.users.repair()
    problem = operator.users.problem(CHAT)
    await run(redis, "ACL", "DELUSER", "limited")
    assert problem is not None
    assert problem.reason == "RedisUsersRefused"
    assert "the operator's log" in problem.message
    assert "limited" not in problem.message, "tenants read it"
    assert "permissions" not in problem.message
    (reason,) = [vars(record)["reason"] for record in caplog.records if record.levelname == "WARNING"]
    assert "no permissions to run the 'acl" in reason


async def test_a_user_that_redis_refuses_keeps_no_other_from_being_made(operator: Operator, redis: Redis) -> None:
    operator.users.want(CODE, (replace(user(CODE, password=NEW), rules=("+no-such-command",)),))
    operator.users.want(CHAT, (user(CHAT, password=NEW),))
    await operator.users.repair()
    problem = operator.users.problem(CODE)
    assert problem is not None
    assert problem.reason == "RedisUsersRefused"
    assert operator.users.problem(CHAT) is None
    assert operator.num_set == 5
    assert not await has(redis, user(CHAT, Role.READER).name), "nor others from being deleted"
    assert operator.notified == [CODE]


async def test_a_node_that_hangs_keeps_no_other_from_getting_its_users(
    operator: Operator, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: str) -> None:
        await asyncio.Event().wait()

    async def nodes(client: streams.Client) -> dict[str, redis_users.Run]:
        return {"hanging": hang, "": client.execute_command}

    monkeypatch.setattr(redis_users, "_NODE_S", 0.1)
    monkeypatch.setattr(redis_users, "_nodes", nodes)
    operator.users.want(CHAT, (user(CHAT, password=NEW),))
    await operator.users.repair()
    assert operator.num_set == 5
    problem = operator.users.problem(CHAT)
    assert problem is not None
    assert problem.reason == "RedisUnreachable"
    assert operator.users.problem(CODE) is None, "its users were right when both nodes last answered"


async def test_the_documented_permissions_are_enough_for_the_operator(redis: Redis, redis_url: str) -> None:
    text = (Path(__file__).parents[3] / "docs" / "install.md").read_text(encoding="utf-8")
    _, _, command = text.partition("ACL SETUSER updraft-operator on '>PASSWORD' ")
    words = shlex.split(command.partition("```")[0].replace("\\\n", " "))
    await run(redis, "ACL", "SETUSER", "updraft-operator", "on", ">secret", *words)
    await redis.config_set("maxmemory", 10**9)
    url = user_url(redis_url, "updraft-operator", "secret")
    operator = Operator(url)
    operator.users.want(CHAT, (user(CHAT), user(CHAT, Role.READER)), drains="6f1c:team")
    await operator.users.repair()
    assert operator.users.unread(CHAT) == 0
    operator.existing.remove(CHAT)
    operator.users.forget(CHAT)
    await operator.users.repair()
    async with streams.connect(url) as client:
        await streams.delete(client, "6f1c:team", "chat")
    log = await redis.acl_log()
    await run(redis, "ACL", "DELUSER", "updraft-operator")
    await redis.config_set("maxmemory", 0)
    assert operator.num_set == 2
    assert operator.users.max_memory == 10**9
    assert not {user(CHAT, role).name for role in Role} & await names(redis)
    assert {str(entry["object"]) for entry in log if entry["username"] == "updraft-operator"} <= OF_ITSELF


async def test_no_write_fails_while_passwords_are_replaced_again_and_again(operator: Operator, redis_url: str) -> None:
    passwords, num_written = [OLD], [0, 0]
    is_over = asyncio.Event()

    async def writes(pod: int) -> None:
        """A pod that connects anew for each trace, with the password that it got when it was replaced last."""
        while not is_over.is_set():
            assert await can_append(redis_url, CHAT, passwords[-1 if pod else max(-2, -len(passwords))])
            num_written[pod] += 1

    async with asyncio.TaskGroup() as tasks:
        for pod in range(2):
            tasks.create_task(writes(pod))
        for number in range(10):
            new = f"{number:064x}"
            operator.users.want(CHAT, (user(CHAT, password=new, keeps_former=True),))
            await operator.users.repair()
            before = list(num_written)
            passwords.append(new)
            passwords[:] = passwords[-2:]
            await until(lambda before=before: before[0] + 3 < num_written[0], what="traces of the old pod")  # type: ignore[misc] # a default
            passwords[:] = [new]
            reached = list(num_written)
            await until(lambda reached=reached: reached[0] + 3 < num_written[0], what="traces of the new pod")  # type: ignore[misc] # a default
            operator.users.want(CHAT, (user(CHAT, password=new),))
            await operator.users.repair()
            assert not await can_append(redis_url, CHAT, OLD)
        is_over.set()
    assert operator.users.problem(CHAT) is None
