"""Secrets: what is read, how long it is believed, and what is missed."""

import base64
from collections.abc import Mapping
from typing import Any

import pytest
from tests.support.clock import ManualClock
from tests.support.manifests import speculator
from tests.unit.operator.memory_cluster import MemoryCluster

from updraft_chassis.errors import Forbidden
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.redis_users import Role
from updraft_operator.planning.objects import Key
from updraft_operator.planning.observed import MissingSecret
from updraft_operator.process import read_key
from updraft_operator.settings import OperatorSettings
from updraft_operator.watching.redis_servers import DedicatedRedis
from updraft_operator.watching.secrets import FRESH_S, Secrets, fresh_passwords, named

QWEN = Key("team", "qwen")
OWN_REDIS = {"traces": {"redis": {"urlSecretRef": {"name": "mine", "key": "address"}}}}


class Guarded(MemoryCluster):
    """One whose role may not read some Secrets, and that counts what is read."""

    def __init__(self, *forbidden: str) -> None:
        super().__init__()
        self.forbidden, self.reads = forbidden, list[str]()

    async def get(self, kind: str, namespace: str, name: str) -> Manifest:
        self.reads.append(name)
        if name in self.forbidden:
            raise Forbidden(f"no right to {name}")
        return await super().get(kind, namespace, name)


def _secret(cluster: MemoryCluster, name: str, content: Mapping[str, str]) -> None:
    data = {entry: base64.b64encode(value.encode()).decode() for entry, value in content.items()}
    cluster.set({"kind": "Secret", "metadata": {"name": name, "namespace": "team"}, "data": data})


async def test_what_the_own_secrets_say_is_read() -> None:
    cluster = MemoryCluster()
    _secret(cluster, "qwen-redis-writer", {"url": "redis://own", "other": "x"})
    _secret(cluster, "qwen-redis-reader", {"other": "x"})
    snapshot = await Secrets(cluster, ManualClock()).read(QWEN, speculator())
    assert snapshot.redis_urls == {Role.WRITER: "redis://own", Role.READER: ""}
    assert snapshot.missing == ()


async def test_a_secret_that_is_not_there_yet_says_nothing() -> None:
    snapshot = await Secrets(MemoryCluster(), ManualClock()).read(QWEN, speculator())
    assert snapshot.redis_urls == {}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param({}, [], id="none"),
        pytest.param({"targetModel": {"secretRef": {"name": "hub"}}}, [("hub", "")], id="of the download"),
        pytest.param(OWN_REDIS, [("mine", "address")], id="of Redis"),
        pytest.param(
            {"traces": {"redis": {"urlSecretRef": {"name": "pods"}, "readerUrlSecretRef": {"name": "trainer"}}}},
            [("pods", "url"), ("trainer", "url")],
            id="of the users of Redis",
        ),
        pytest.param({"serving": {"apiKeysSecretRef": {"name": "mine"}}}, [("mine", "keys")], id="of API keys"),
        pytest.param(
            {"registry": {"bucket": {"url": "s3://b/p", "secretRef": {"name": "bucket"}}}},
            [("bucket", "")],
            id="of the bucket",
        ),
        pytest.param({"registry": {"bucket": {"url": "s3://b/p"}}}, [], id="a bucket without one"),
    ],
)
def test_secrets_that_a_spec_names(spec: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert list(named(speculator(spec))) == expected


@pytest.mark.parametrize(
    ("content", "missing"),
    [
        pytest.param(None, (MissingSecret("mine"),), id="no Secret"),
        pytest.param({"other": "x"}, (MissingSecret("mine"),), id="without the entry"),
        pytest.param({"address": "redis://"}, (), id="with the entry"),
    ],
)
async def test_what_a_spec_names_is_missed_by_name(
    content: dict[str, str] | None, missing: tuple[MissingSecret, ...]
) -> None:
    cluster = MemoryCluster()
    if content is not None:
        _secret(cluster, "mine", content)
    assert (await Secrets(cluster, ManualClock()).read(QWEN, speculator(OWN_REDIS))).missing == missing


async def test_a_secret_that_may_not_be_read_may_be_there() -> None:
    snapshot = await Secrets(Guarded("mine"), ManualClock()).read(QWEN, speculator(OWN_REDIS))
    assert snapshot.missing == ()


async def test_without_the_right_to_its_own_secret_no_new_password_is_made_up() -> None:
    with pytest.raises(Forbidden):
        await Secrets(Guarded("qwen-redis-writer"), ManualClock()).read(QWEN, speculator())


async def _reads_after(clock: ManualClock, cluster: Guarded, secrets: Secrets, owner: AdaptiveSpeculator) -> int:
    before = len(cluster.reads)
    await secrets.read(QWEN, owner)
    return len(cluster.reads) - before


async def test_secrets_are_read_when_they_expire_and_when_the_spec_changes() -> None:
    clock, cluster = ManualClock(), Guarded()
    secrets = Secrets(cluster, clock)
    assert await _reads_after(clock, cluster, secrets, speculator()) == 2
    clock.advance(3600)
    assert await _reads_after(clock, cluster, secrets, speculator()) == 0
    assert await _reads_after(clock, cluster, secrets, speculator(generation=2)) == 2
    secrets.expire()
    assert await _reads_after(clock, cluster, secrets, speculator(generation=2)) == 2
    secrets.forget(QWEN)
    assert await _reads_after(clock, cluster, secrets, speculator(generation=2)) == 2


async def test_secrets_are_read_once_a_minute_while_one_is_missing() -> None:
    clock, cluster = ManualClock(), Guarded()
    secrets = Secrets(cluster, clock)
    assert await _reads_after(clock, cluster, secrets, speculator(OWN_REDIS)) == 1
    clock.advance(FRESH_S - 1)
    assert await _reads_after(clock, cluster, secrets, speculator(OWN_REDIS)) == 0
    _secret(cluster, "mine", {"address": "redis://"})
    clock.advance(2)
    assert await _reads_after(clock, cluster, secrets, speculator(OWN_REDIS)) == 1
    clock.advance(FRESH_S + 1)
    assert await _reads_after(clock, cluster, secrets, speculator(OWN_REDIS)) == 0


async def test_one_entry_can_be_asked_for() -> None:
    cluster = MemoryCluster()
    _secret(cluster, "mine", {"address": "redis://"})
    secrets = Secrets(cluster, ManualClock())
    assert await secrets.entry("team", "mine", "address") == "redis://"
    assert await secrets.entry("team", "mine", "other") == ""
    assert await secrets.entry("team", "another", "address") == ""


async def test_its_own_secrets_are_not_read_where_they_are_not_used() -> None:
    cluster = Guarded()
    await Secrets(cluster, ManualClock()).read(QWEN, speculator(OWN_REDIS))
    assert cluster.reads == ["mine"]


def test_passwords_are_long_and_of_their_own() -> None:
    made = [*fresh_passwords().values(), *fresh_passwords().values()]
    assert len(set(made)) == 8
    assert {len(password) for password in made} == {64}


def _settings(*, dry_run: bool = False) -> OperatorSettings:
    return OperatorSettings(namespace="team", redis_key_secret="key-of-redis", dry_run=dry_run)  # noqa: S106 - a name


@pytest.mark.parametrize("is_there", [True, False], ids=["the chart made the Secret", "it did not"])
async def test_the_key_of_dedicated_redis_is_made_once(*, is_there: bool) -> None:
    cluster, first, second = MemoryCluster(), DedicatedRedis(address="redis"), DedicatedRedis(address="redis")
    if is_there:
        _secret(cluster, "key-of-redis", {})
    await read_key(first, cluster, _settings())
    await read_key(second, cluster, _settings())
    assert len(first.key) == 32
    assert second.key == first.key
    assert first.url(QWEN) != ""


@pytest.mark.parametrize("entries", [None, {"key": "short"}])
async def test_a_key_that_cannot_be_read_is_asked_for_again(entries: Mapping[str, str] | None) -> None:
    cluster, dedicated = Guarded("key-of-redis"), DedicatedRedis(address="redis")
    if entries is not None:
        cluster.forbidden = ()
        _secret(cluster, "key-of-redis", entries)
    await read_key(dedicated, cluster, _settings())
    assert dedicated.url(QWEN) == ""
    cluster.forbidden = ()
    _secret(cluster, "key-of-redis", {"key": "x" * 32})
    await read_key(dedicated, cluster, _settings())
    assert dedicated.key == b"x" * 32


async def test_a_dry_run_before_there_is_a_key_plans_with_another_one() -> None:
    cluster, dedicated = MemoryCluster(), DedicatedRedis(address="redis")
    await read_key(dedicated, cluster, _settings(dry_run=True))
    assert dedicated.url(QWEN) != ""
    assert cluster.writes == []
