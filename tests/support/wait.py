"""Wait for a condition instead of sleeping for a guess."""

import asyncio
import time
from collections.abc import Awaitable, Callable

_POLL_S = 0.02

LONG_S = 60.0
"""For what takes a second on a machine of one's own: a test that shares its cores may wait much longer."""


def wait_until(condition: Callable[[], bool], *, timeout_s: float = LONG_S, what: str = "the condition") -> None:
    """Return once `condition()` is true; raise TimeoutError after `timeout_s` seconds."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come true in {timeout_s:g} s")
        time.sleep(_POLL_S)


async def until(
    condition: Callable[[], bool | Awaitable[bool]],
    *,
    timeout_s: float = LONG_S,
    what: str = "the condition",
) -> None:
    """Like `wait_until`, in a coroutine; `condition` may be one too."""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                result = condition()
                if result is True or (not isinstance(result, bool) and await result):
                    return
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise TimeoutError(f"{what} did not come true in {timeout_s:g} s") from error
