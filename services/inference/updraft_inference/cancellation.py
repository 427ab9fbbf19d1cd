"""Runs a coroutine until it ends or another one interrupts it, or to its end whatever happens."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818 - an outcome, not an error
    """The interruption came first; the work was cancelled and has ended."""


async def run_unless_cancelled_by(interruption: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. Raises Interrupted if `interruption` ends first; errors of both are raised.

    Both have ended when this returns.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(work)
            waiting = tasks.create_task(interruption)
            await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
            working.cancel()
            waiting.cancel()
    except BaseExceptionGroup as group:
        raise_if_cancelled()
        raise group.exceptions[0] from None
    if working.cancelled():
        raise Interrupted
    return working.result()


def raise_if_cancelled() -> None:
    """Raise a cancellation of this task that a library swallowed, as grpc.aio does for a call that fails at that moment."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def run_to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. If this task is cancelled meanwhile, the work still ends first."""
    task = asyncio.create_task(work)  # noqa: TID251 - awaited here; a group would cancel it with this task
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):  # it may be cancelled again
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # marks it as retrieved, because nobody awaits the task
        raise
