"""Do something unless something else happens first."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818 - an outcome, not a failure
    """The other thing happened first; the work was cancelled and has ended."""


async def run_unless_cancelled_by(interruption: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or Interrupted. Errors of either come through; neither runs on afterwards."""
    try:
        async with asyncio.TaskGroup() as tasks:
            doing = tasks.create_task(work)
            watching = tasks.create_task(interruption)
            await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
            doing.cancel()
            watching.cancel()
    except BaseExceptionGroup as group:
        raise_if_cancelled()
        raise group.exceptions[0] from None
    if doing.cancelled():
        raise Interrupted
    return doing.result()


def raise_if_cancelled() -> None:
    """Raise the cancellation of this task that a library swallowed: grpc.aio does, for a call that fails just then."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
