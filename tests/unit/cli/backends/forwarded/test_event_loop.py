"""Calls of several threads share one event loop, and its end keeps nobody waiting."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from updraft_chassis.errors import Unavailable
from updraft_cli.backends.forwarded.event_loop import EventLoop


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    one = EventLoop("test")
    yield one
    one.close()


async def its_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_calls_of_several_threads_run_in_one_loop(loop: EventLoop) -> None:
    with ThreadPoolExecutor(4) as threads:
        loops = set(threads.map(lambda _: loop.run(its_loop()), range(20)))
    assert len(loops) == 1


def test_an_error_reaches_the_thread_that_called(loop: EventLoop) -> None:
    async def fail() -> None:
        raise Unavailable("no registry answers")

    with pytest.raises(Unavailable, match="no registry answers"):
        loop.run(fail())


def test_the_end_cancels_what_runs_and_refuses_what_comes(loop: EventLoop) -> None:
    has_begun = Event()

    async def hang() -> None:
        has_begun.set()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(loop.run, hang())
        has_begun.wait()
        loop.close()
        with pytest.raises(Unavailable, match="the console has ended"):
            hanging.result()
    with pytest.raises(Unavailable, match="the console has ended"):
        loop.run(its_loop())
