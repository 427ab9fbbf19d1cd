"""The observer reads a backend from memory: often while somebody looks, and through outages."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.support.console import MemoryBackend, memory_backend
from tests.support.wait import LONG_S, until

from updraft_chassis.errors import Unavailable
from updraft_cli.ui.observer import Observer, Pace

QUICK = Pace(watched_s=0.01, idle_s=3600.0, patience_s=LONG_S)


@asynccontextmanager
async def observing(backend: MemoryBackend, pace: Pace = QUICK) -> AsyncIterator[Observer]:
    observer = Observer(backend, pace)
    observer.begin()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(observer.run())
        try:
            yield observer
        finally:
            observer.close()


async def test_while_somebody_looks_it_reads_on_and_keeps_samples() -> None:
    async with observing(memory_backend()) as observer:
        with observer.watched():
            await until(lambda: len(observer.samples("qwen")) >= 5, what="five samples")
        first = observer.snapshot.time
        assert observer.revision >= 4
    assert first <= observer.snapshot.time


async def test_while_nobody_looks_it_rests_until_a_page_asks() -> None:
    async with observing(memory_backend()) as observer:
        await until(lambda: observer.revision == 1, what="the first read of the loop")
        assert not await observer.wait(1, within_s=0.1)
        await observer.renew()
        assert observer.revision == 2


async def test_an_outage_is_a_sentence_and_the_last_state_stays() -> None:
    backend = memory_backend()
    async with observing(backend) as observer:
        with observer.watched():
            backend.memory.problem = Unavailable("the registry is away")
            await until(lambda: observer.problem == "the registry is away", what="the outage")
            assert observer.snapshot.speculator("qwen") is not None
            backend.memory.problem = None
            await until(lambda: not observer.problem, what="the end of the outage")


@pytest.mark.parametrize(
    "error", [KeyError("items"), RuntimeError("no"), json.JSONDecodeError("Expecting value", "<", 0)]
)
async def test_an_answer_that_is_not_the_backends_is_a_sentence_and_it_reads_on(error: Exception) -> None:
    backend = memory_backend()
    async with observing(backend) as observer:
        with observer.watched():
            backend.memory.problem = error
            await until(lambda: type(error).__name__ in observer.problem, what="the problem")
            backend.memory.problem = None
            await until(lambda: not observer.problem, what="the end of the problem")


async def test_a_backend_that_does_not_answer_at_the_start_is_an_error() -> None:
    backend = memory_backend()
    backend.memory.problem = Unavailable("no registry answers")
    with pytest.raises(Unavailable, match="no registry answers"):
        Observer(backend, QUICK).begin()


async def test_an_observer_closed_during_a_read_ends_after_it() -> None:
    observer, begun, hold = Observer(memory_backend(), QUICK), threading.Event(), threading.Event()
    observer.begin()

    def slow() -> None:
        begun.set()
        hold.wait()

    held = asyncio.ensure_future(observer.call(slow))  # noqa: TID251 - awaited below
    await asyncio.to_thread(begun.wait)
    running = asyncio.ensure_future(observer.run())  # noqa: TID251 - awaited below
    await asyncio.sleep(0)  # the observer waits for a read, which comes after the slow call
    observer.close()
    await asyncio.sleep(0)  # it has been told, while it reads
    hold.set()
    async with asyncio.timeout(LONG_S):
        await running
    await held


async def test_a_page_waits_only_a_moment_for_a_slow_backend() -> None:
    patient = Pace(watched_s=0.01, idle_s=3600.0, fresh_s=0.0, patience_s=0.05)
    async with observing(memory_backend(), patient) as observer:
        await until(lambda: observer.revision == 1, what="the first read of the loop")
        hold = threading.Event()
        slow = asyncio.ensure_future(observer.call(hold.wait))  # noqa: TID251 - awaited below
        await observer.refresh()
        assert observer.revision == 1
        hold.set()
        await slow


async def test_closing_ends_every_wait() -> None:
    async with observing(memory_backend()) as observer:
        await until(lambda: observer.revision == 1, what="the first read of the loop")
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(observer.wait(1, within_s=3600.0))
            await asyncio.sleep(0)
            observer.close()
    assert waiting.result() is False
