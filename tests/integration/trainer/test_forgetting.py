"""Forgotten tenants and old traces, with a real Redis and a real replay."""

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from tests.support.clock import ManualClock
from tests.support.traces import TraceMaker

from updraft_chassis import streams
from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import Unavailable
from updraft_chassis.streams.consumer import Consumer
from updraft_chassis.tenants import hashes
from updraft_trainer.data.forgetting import SKEW_MS, Forgetting, is_forgotten
from updraft_trainer.data.intake import Intake
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import ReplayLimits
from updraft_trainer.data.sample import SCHEMA
from updraft_trainer.metrics import Metrics

ACME, RIVAL = 2**64 - 1, 7
(KEY,) = streams.keys("default", "default", 1)
DEAD = f"{KEY}:dead"


@pytest.fixture
def replay(tmp_path: Path, traces: TraceMaker) -> Iterator[Replay]:
    limits = ReplayLimits.of(10 * 1024**2)
    with Replay.open(tmp_path / "replay", limits=limits, expected=traces.expected, cache_bytes=1024**2) as replay:
        yield replay


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def forgetting(
    client: Redis,
    replay: Replay,
    metrics: Metrics,
    *,
    unread: Sequence[str] = (),
    retention_s: int | None = None,
    clock: ManualClock | None = None,
) -> Forgetting:
    clock_ = clock or ManualClock()
    return Forgetting(client, [KEY], replay, unread=unread, retention_s=retention_s, metrics=metrics, clock=clock_)


def intake(client: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics) -> tuple[Consumer, Intake]:
    consumer = Consumer(client, KEY, group="trainer", name="trainer-0", claim_idle=timedelta(hours=1))
    return consumer, Intake(consumer, replay, traces.expected, metrics=metrics, clock=SystemClock())


def refused(metrics: Metrics, reason: str) -> float:
    value = metrics.registry.get_sample_value("updraft_trainer_samples_refused_total", {"reason": reason})
    return value or 0.0


async def test_an_order_deletes_in_streams_dead_letters_and_replay_and_refuses_what_arrives_later(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    producer = streams.Producer(redis, KEY, max_bytes=64 * 1024**2)
    consumer, task = intake(redis, replay, traces, metrics)
    await consumer.open()
    order_ms = int(1000 * time.time()) - 5 * 60_000
    for seed, tenant in enumerate((ACME, RIVAL, 0)):  # stored
        await producer.append(traces.data(seed, tenant=tenant, finished_ms=order_ms))
    await producer.append(b"\xff not a trace")  # a dead letter, which nobody knows the tenant of
    await task.store_batch()
    assert (len(replay.training_ids()), await redis.xlen(DEAD)) == (3, 1)
    for seed, tenant in ((10, ACME), (11, RIVAL)):  # in the stream
        await producer.append(traces.data(seed, tenant=tenant, finished_ms=order_ms))

    orders = forgetting(redis, replay, metrics)
    orders.orders = {hashes.text(ACME): order_ms}
    await orders.turn()

    assert orders.done_ms == order_ms
    assert (await redis.xlen(KEY), await redis.xlen(DEAD)) == (1, 1), "nobody has ordered to delete what is no trace"
    for seed, finished_ms in ((20, order_ms + SKEW_MS), (21, order_ms + SKEW_MS + 1)):  # late, and after the order
        await producer.append(traces.data(seed, tenant=ACME, finished_ms=finished_ms))
    await task.store_batch()
    assert replay.tenants(replay.training_ids()) == {hashes.text(RIVAL), hashes.text(ACME)}
    assert len(replay.training_ids()) == 4
    assert refused(metrics, "forgotten") == 1


async def test_entries_that_are_already_read_are_refused_too(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    producer = streams.Producer(redis, KEY, max_bytes=64 * 1024**2)
    consumer, task = intake(redis, replay, traces, metrics)
    await consumer.open()
    now_ms = int(1000 * time.time())
    for seed in range(12):  # a batch is stored, and the next one is read ahead
        await producer.append(traces.data(seed, tenant=ACME, finished_ms=now_ms))
    await task.store_batch()
    orders = forgetting(redis, replay, metrics)
    orders.orders = {hashes.text(ACME): now_ms}
    await orders.turn()

    await task.store_batch()

    assert replay.training_ids() == []
    assert refused(metrics, "forgotten") == 4


async def test_an_order_that_redis_interrupts_is_carried_out_when_it_is_back(
    replay: Replay, traces: TraceMaker, metrics: Metrics, redis: Redis
) -> None:
    now_ms = int(1000 * time.time())
    await streams.Producer(redis, KEY, max_bytes=1024**2).append(traces.data(1, tenant=ACME, finished_ms=now_ms))
    async with streams.connect("redis://127.0.0.1:1/0") as away:
        assert isinstance(away, Redis)
        interrupted = forgetting(away, replay, metrics)
        interrupted.orders = {hashes.text(ACME): now_ms}
        with pytest.raises(Unavailable):
            await interrupted.turn()
        assert interrupted.done_ms == 0

    again = forgetting(redis, replay, metrics)
    again.orders = interrupted.orders
    await again.turn()

    assert (again.done_ms, await redis.xlen(KEY)) == (now_ms, 0)


async def test_old_entries_go_when_a_new_one_comes_and_when_the_trainer_looks(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    now_ms = int(1000 * time.time())
    for key in (KEY, DEAD):
        await redis.xadd(key, {"t": b"old"}, id=f"{now_ms - 61_000}-0")
        await redis.xadd(key, {"t": b"new"}, id=f"{now_ms - 30_000}-0")
    producer = streams.Producer(redis, KEY, max_bytes=1024**2, retention_s=60)

    for data in (b"first", b"second"):
        assert await producer.append(data) == 0, "age is no loss for want of space"

    rows: Any = await redis.xrange(KEY)
    assert [fields[b"t"] for _, fields in rows] == [b"new", b"first", b"second"]
    assert 0 < await redis.pttl(KEY) <= 60_000, "the stream disappears although nobody reads or writes"
    clock = ManualClock()
    task = forgetting(redis, replay, metrics, retention_s=60, clock=clock)
    await task.turn()
    assert await redis.xlen(DEAD) == 1


async def test_old_samples_are_deleted_from_replay(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    producer = streams.Producer(redis, KEY, max_bytes=64 * 1024**2)
    consumer, task = intake(redis, replay, traces, metrics)
    await consumer.open()
    now_ms = int(1000 * time.time())
    for seed, age_ms in ((1, 120_000), (2, 0)):
        await producer.append(traces.data(seed, finished_ms=now_ms - age_ms))
    await task.store_batch()
    clock = ManualClock()
    clock.advance(now_ms / 1000 - clock.now())

    await forgetting(redis, replay, metrics, retention_s=60, clock=clock).turn()

    assert len(replay.training_ids()) == 1


@pytest.mark.attack(
    boundary="tenants",
    attack="traces that outlive the age that their tenant allows: in replay, in a stream, among dead letters, or late",
    outcome="they are deleted or refused; those of others stay",
)
async def test_traces_go_at_the_age_that_their_tenant_allows(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    now_ms, clock = int(1000 * time.time()), ManualClock()
    clock.advance(now_ms / 1000 - clock.now())
    acme = partial(traces.data, tenant=ACME, retention_s=3600)
    producer = streams.Producer(redis, KEY, max_bytes=64 * 1024**2)
    consumer, task = intake(redis, replay, traces, metrics)
    await consumer.open()
    for data in (acme(1, finished_ms=now_ms), traces.data(2, finished_ms=now_ms)):
        await producer.append(data)
    await producer.append(acme(3, finished_ms=now_ms - 3_600_000))
    await task.store_batch()
    assert (refused(metrics, "expired"), len(replay.training_ids())) == (1, 2)
    for key in (KEY, DEAD):
        await redis.xadd(key, {"t": acme(4, finished_ms=now_ms)})
        await redis.xadd(key, {"t": traces.data(5, finished_ms=now_ms)})
        await redis.xadd(key, {"t": b"no trace"})
    deleting = forgetting(redis, replay, metrics, clock=clock)

    await deleting.turn()
    assert len(replay.training_ids()) == 2, "they are not old enough"
    clock.advance(3601)
    await deleting.turn()

    assert replay.tenants(replay.training_ids()) == set()
    assert [await redis.xlen(key) for key in (KEY, DEAD)] == [2, 2]


async def test_replay_is_rewritten_for_age_only_when_a_hundredth_of_it_has_passed(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    producer = streams.Producer(redis, KEY, max_bytes=64 * 1024**2)
    consumer, task = intake(redis, replay, traces, metrics)
    await consumer.open()
    now_ms, clock = int(1000 * time.time()), ManualClock()
    clock.advance(now_ms / 1000 - clock.now())
    await producer.append(traces.data(1, finished_ms=now_ms - 19_950_000))
    await task.store_batch()
    ages = forgetting(redis, replay, metrics, retention_s=20_000, clock=clock)

    kept = []
    for seconds in (0, 100, 101):
        clock.advance(seconds)
        await ages.turn()
        kept.append(len(replay.training_ids()))

    assert kept == [1, 1, 0]


def unsupported(traces: TraceMaker, seed: int, tenant: int, finished_ms: int) -> bytes:
    """A trace whose sender can be read, and which is no valid one."""
    trace = traces.trace(seed, tenant=tenant, finished_ms=finished_ms)
    trace.header.schema = SCHEMA + 1
    return trace.SerializeToString()


async def test_a_pod_whose_clock_is_ahead_keeps_nothing_from_an_order(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    producer = streams.Producer(redis, KEY, max_bytes=64 * 1024**2)
    consumer, task = intake(redis, replay, traces, metrics)
    await consumer.open()
    now_ms = int(1000 * time.time())
    ahead_ms = now_ms + 20 * 3_600_000
    await producer.append(traces.data(1, tenant=ACME, finished_ms=ahead_ms))
    await task.store_batch()
    await producer.append(traces.data(2, tenant=ACME, finished_ms=ahead_ms))
    assert len(replay.training_ids()) == 1

    orders = forgetting(redis, replay, metrics)
    orders.orders = {hashes.text(ACME): now_ms}
    await orders.turn()

    assert (replay.training_ids(), await redis.xlen(KEY)) == ([], 0)


async def test_a_start_searches_streams_again_only_for_newer_orders(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    now_ms = int(1000 * time.time())
    first = forgetting(redis, replay, metrics)
    first.orders = {hashes.text(ACME): now_ms}
    await first.turn()
    await redis.xadd(KEY, {"t": traces.data(1, tenant=ACME, finished_ms=now_ms)})
    await redis.xadd(KEY, {"t": traces.data(2, tenant=RIVAL, finished_ms=now_ms)})

    again = forgetting(redis, replay, metrics)
    again.orders = first.orders
    await again.turn()
    assert (again.done_ms, await redis.xlen(KEY)) == (now_ms, 2), "intake refuses it"
    again.orders = {**first.orders, hashes.text(RIVAL): now_ms + 1}
    await again.turn()

    assert (again.done_ms, await redis.xlen(KEY)) == (now_ms + 1, 1)


async def test_streams_that_no_rank_reads_are_searched_too(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    now_ms = int(1000 * time.time())
    unread = streams.keys("default", "default", 3)[1:]
    for key in unread:
        await redis.xadd(key, {"t": traces.data(1, tenant=ACME, finished_ms=now_ms)})
    orders = forgetting(redis, replay, metrics, unread=unread)
    orders.orders = {hashes.text(ACME): now_ms}

    await orders.turn()

    assert [await redis.xlen(key) for key in unread] == [0, 0]


async def test_what_a_forgotten_tenant_sends_late_becomes_no_dead_letter_and_others_disappear_with_age(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    now_ms = int(1000 * time.time())
    replay.forget({hashes.text(ACME): now_ms})
    consumer = Consumer(
        redis,
        KEY,
        group="trainer",
        name="trainer-0",
        claim_idle=timedelta(hours=1),
        retention_s=60,
        is_unwanted=partial(is_forgotten, replay),
    )
    task = Intake(consumer, replay, traces.expected, metrics=metrics, clock=SystemClock())
    await consumer.open()
    await redis.xadd(KEY, {"t": unsupported(traces, 1, ACME, now_ms)})
    await task.store_batch()
    assert (await redis.xlen(KEY), await redis.exists(DEAD)) == (0, 0)
    await redis.xadd(KEY, {"t": unsupported(traces, 2, RIVAL, now_ms)})
    await task.store_batch()

    assert (await redis.xlen(KEY), await redis.xlen(DEAD)) == (0, 1)
    assert 0 < await redis.pttl(DEAD) <= 60_000
