import asyncio

import pytest

from updraft_inference.cancellation import Interrupted, run_unless_cancelled_by


async def never() -> None:
    await asyncio.Event().wait()


async def test_work_that_is_first_gives_its_result() -> None:
    async def work() -> int:
        return 5

    assert await run_unless_cancelled_by(never(), work()) == 5


async def test_work_that_is_interrupted_has_cleaned_up() -> None:
    log = []

    async def work() -> None:
        try:
            await never()
        finally:
            log.append("cleaned up")

    with pytest.raises(Interrupted):
        await run_unless_cancelled_by(asyncio.sleep(0), work())
    assert log == ["cleaned up"]


async def test_an_error_comes_through_as_it_is() -> None:
    async def work() -> None:
        raise KeyError("k")

    with pytest.raises(KeyError):
        await run_unless_cancelled_by(never(), work())


async def test_cancelling_the_race_cancels_both() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await run_unless_cancelled_by(never(), never())


async def test_a_cancellation_that_the_work_swallowed_is_not_lost() -> None:
    async def stubborn() -> None:
        try:
            await never()
        except asyncio.CancelledError:
            raise KeyError("an error instead") from None

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await run_unless_cancelled_by(never(), stubborn())
