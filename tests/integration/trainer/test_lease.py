import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis
from tests.support.clock import ManualClock
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.wait import until

from updraft_chassis import streams
from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import Conflict, Unavailable
from updraft_chassis.lifecycle import Stop
from updraft_trainer.coordination import lease as coordination
from updraft_trainer.coordination.lease import Lease

KEY = streams.lease_key("default", "default")


def lease(redis: Redis, holder: str, *, duration_s: float = 60.0, clock: ManualClock | None = None) -> Lease:
    return Lease(redis, KEY, holder, holder_id=holder, duration_s=duration_s, clock=clock or SystemClock())


async def test_one_of_two_holds_the_lease_until_it_releases_it(redis: Redis) -> None:
    first, second = lease(redis, "first"), lease(redis, "second")
    assert await first.take() == "first"
    assert await second.take() == "first"
    assert first.is_held
    assert not second.is_held
    await second.release()
    assert await second.take() == "first", "only its holder releases it"
    await first.release()
    assert await second.take() == "second"
    await second.release()


async def test_one_of_many_that_ask_at_once_holds_the_lease(redis: Redis) -> None:
    asking = [lease(redis, f"holder-{number}") for number in range(10)]
    answers = await asyncio.gather(*(one.take() for one in asking))
    (holder,) = set(answers)
    assert [f"holder-{number}" for number, one in enumerate(asking) if one.is_held] == [holder]


async def test_a_lease_that_may_be_anothers_by_now_is_not_deleted(redis: Redis) -> None:
    clock = ManualClock()
    late = lease(redis, "late", duration_s=1.0, clock=clock)
    await late.take()
    clock.advance(1.0)
    other = lease(redis, "other", duration_s=6.0)
    await other.wait(Stop())
    await late.release()
    assert await lease(redis, "third").take() == "other"


async def test_another_holder_is_named_even_if_it_ends_right_then(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lease(redis, "first").take()
    get = redis.get

    async def get_before_its_end(key: str) -> object:
        value = await get(key)
        await redis.delete(key)
        return value

    monkeypatch.setattr(redis, "get", get_before_its_end)
    assert await lease(redis, "second").take() == "first"


async def test_a_release_that_redis_does_not_answer_ends_with_the_lease(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(_: str) -> None:
        await asyncio.Event().wait()

    clock = ManualClock()
    late = lease(redis, "late", duration_s=3.01, clock=clock)
    await late.take()
    monkeypatch.setattr(redis, "unlink", hang)
    monkeypatch.setattr(coordination, "_RELEASE_S", 0.0)
    clock.advance(3.0)
    with pytest.raises(Unavailable, match="the lease of late ran out before Redis deleted it"):
        await late.release()
    assert not late.is_held


async def test_the_same_holder_has_it_again_after_a_crash(redis: Redis) -> None:
    assert await lease(redis, "first").take() == "first"
    assert await lease(redis, "first").take() == "first"


async def test_a_holder_with_another_name_is_known_by_its_id(redis: Redis) -> None:
    renamed = Lease(redis, KEY, "renamed", holder_id="first", duration_s=60.0, clock=SystemClock())
    assert await lease(redis, "first").take() == "first"
    assert await renamed.take() == "renamed"
    assert renamed.is_held
    await renamed.release()
    assert await lease(redis, "second").take() == "second"


async def test_who_has_seen_a_holder_waits_through_an_outage_of_redis(short_tmp_path: Path) -> None:
    with RedisServer(short_tmp_path, durable=True) as server:
        async with streams.connect(server.url) as client:
            assert isinstance(client, Redis)
            first, attempts, stop = lease(client, "first"), list[bool](), Stop()
            second = Lease(
                client, KEY, "second", holder_id="2", duration_s=0.3, clock=SystemClock(), on_change=attempts.append
            )
            await first.take()
            async with asyncio.TaskGroup() as tasks:
                waiting = tasks.create_task(second.wait(stop))
                await until(lambda: bool(attempts), what="a first try")
                server.kill()
                num_before = len(attempts)
                await until(lambda: len(attempts) > num_before + 2, what="tries without Redis")
                assert not waiting.done()
                server.start()
                num_before = len(attempts)
                await until(lambda: len(attempts) > num_before + 2, what="tries with Redis again")
                assert not waiting.done()
                assert not second.was_taken
                await first.release()
                await until(waiting.done, what="the end of the wait")
            assert second.was_taken


async def test_a_lease_that_cannot_be_renewed_says_why_once(
    short_tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(short_tmp_path) as server:
        async with streams.connect(server.url) as client:
            assert isinstance(client, Redis)
            clock = ManualClock()
            first = lease(client, "first", clock=clock)
            await first.take()
            server.kill()
            for _ in range(2):
                with pytest.raises(Unavailable):
                    await first.take()
            clock.advance(61.0)
            with pytest.raises(Unavailable, match="because it could not be renewed: Redis is unavailable"):
                first.check()
    assert caplog.text.count("Cannot take or renew the lease of first: Redis is unavailable") == 1


async def test_a_holder_that_falls_silent_is_succeeded(redis: Redis) -> None:
    assert await lease(redis, "first", duration_s=1.0).take() == "first"
    second = lease(redis, "second", duration_s=6.0)
    await second.wait(Stop())
    assert second.is_held


async def test_a_holder_that_was_paused_may_not_act_any_more_and_ends(redis: Redis) -> None:
    clock = ManualClock()
    paused = lease(redis, "paused", duration_s=1.0, clock=clock)
    await paused.take()
    paused.check()
    clock.advance(1.5)
    with pytest.raises(Unavailable, match="the lease of paused has run out"):
        paused.check()
    second = lease(redis, "second", duration_s=6.0)
    await second.wait(Stop())
    with pytest.raises(Conflict, match="second does the work of paused now"):
        await paused.hold(Stop())
    assert not paused.is_held


async def test_a_holder_renews_it_as_long_as_it_holds(redis: Redis) -> None:
    first, stop = lease(redis, "first", duration_s=6.0), Stop()
    await first.take()
    left_ms = [await redis.pttl(KEY)]

    async def is_renewed() -> bool:
        left_ms.append(await redis.pttl(KEY))
        return left_ms[-1] > left_ms[-2]

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(first.hold(stop))
        await until(is_renewed, what="a renewal")
        assert first.is_held
        assert await lease(redis, "second").take() == "first"
        stop.request()
    await first.release()


async def test_a_full_redis_takes_the_lease_from_nobody(redis: Redis) -> None:
    first = lease(redis, "first")
    await first.take()
    before = (await redis.config_get("maxmemory"))["maxmemory"]
    await redis.config_set("maxmemory", 1)
    try:
        assert await first.take() == "first"
    finally:
        await redis.config_set("maxmemory", before or 0)


async def test_without_redis_nobody_waits_and_nobody_may_act() -> None:
    async with streams.connect(f"redis://127.0.0.1:{free_port()}") as client:
        assert isinstance(client, Redis)
        first = lease(client, "first")
        await first.wait(Stop())
        with pytest.raises(Unavailable, match="the lease of first has run out"):
            first.check()


async def test_who_waits_for_the_lease_ends_when_told_to_stop(redis: Redis) -> None:
    await lease(redis, "first").take()
    stop = Stop()
    changes: list[bool] = []
    second = Lease(redis, KEY, "second", holder_id="2", duration_s=60.0, clock=SystemClock(), on_change=changes.append)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(second.wait(stop))
        await until(lambda: changes == [False], what="a first try")
        stop.request()
    assert not second.is_held
