import asyncio
from collections.abc import AsyncGenerator

import pytest

from updraft_inference.http.streaming import merge_streams


async def counting(to: int, closed: list[int], *, fails: bool = False) -> AsyncGenerator[int, None]:
    try:
        for i in range(to):
            yield i
            await asyncio.sleep(0)
        if fails:
            raise ValueError("broken")
        await asyncio.Event().wait() if to == 0 else None
    finally:
        closed.append(to)


async def test_all_items_come_in_their_order_and_one_at_a_time() -> None:
    taken: list[tuple[int, int]] = []
    is_taking = False

    async def take(index: int, item: int) -> None:
        nonlocal is_taking
        assert not is_taking
        is_taking = True
        await asyncio.sleep(0)
        taken.append((index, item))
        is_taking = False

    closed: list[int] = []
    await merge_streams([counting(n, closed) for n in (3, 1, 2)], take)

    assert sorted(taken) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    assert [item for index, item in taken if index == 0] == [0, 1, 2]
    assert taken != sorted(taken), "none waits for another to end"


async def test_the_first_error_is_raised_and_closes_the_others() -> None:
    async def take(index: int, item: int) -> None:
        pass

    closed: list[int] = []
    with pytest.raises(ValueError, match="broken"):
        await merge_streams([counting(0, closed), counting(2, closed, fails=True)], take)

    assert sorted(closed) == [0, 2]
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling(), "the caller goes on"


async def test_a_caller_that_is_cancelled_closes_all() -> None:
    async def take(index: int, item: int) -> None:
        pass

    closed: list[int] = []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await merge_streams([counting(0, closed), counting(0, closed)], take)

    assert closed == [0, 0]
