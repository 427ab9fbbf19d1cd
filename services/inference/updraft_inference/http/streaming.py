"""Merges the streams of several choices."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from updraft_inference.cancellation import raise_if_cancelled

T = TypeVar("T")


async def merge_streams(streams: Sequence[AsyncGenerator[T, None]], take: Callable[[int, T], Awaitable[None]]) -> None:
    """Pass every item of all streams to `take`, with the index of its stream, one at a time as it arrives.

    All streams are closed at the end. The first error of any stream, or of `take`, ends the others and is raised.
    """
    lock = asyncio.Lock()

    async def read(index: int, stream: AsyncGenerator[T, None]) -> None:
        async with aclosing(stream) as items:
            async for item in items:
                async with lock:
                    await take(index, item)

    try:
        async with asyncio.TaskGroup() as tasks:
            reading = [tasks.create_task(read(index, stream)) for index, stream in enumerate(streams)]
            await asyncio.wait(reading)  # in here an error takes back the cancellation with which it ends the wait
    except BaseExceptionGroup as group:
        raise_if_cancelled()
        raise group.exceptions[0] from None
