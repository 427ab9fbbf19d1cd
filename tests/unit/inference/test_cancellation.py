import asyncio

import pytest

from updraft_inference.cancellation import Interrupted, run_to_its_end, run_unless_cancelled_by


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


async def test_work_that_must_end_does_so_before_its_caller_is_cancelled() -> None:
    began, may_end, log = asyncio.Event(), asyncio.Event(), list[str]()

    async def work() -> int:
        began.set()
        await may_end.wait()
        log.append("ended")
        return 5

    async with asyncio.TaskGroup() as tasks:
        caller = tasks.create_task(run_to_its_end(work()))
        await began.wait()
        for _ in range(3):
            caller.cancel()
            await asyncio.sleep(0)
        assert not caller.done()
        may_end.set()

    assert caller.cancelled()
    assert log == ["ended"]


async def test_work_that_must_end_gives_its_result_or_its_error() -> None:
    async def work(number: int) -> int:
        return 1 // number

    assert await run_to_its_end(work(1)) == 1
    with pytest.raises(ZeroDivisionError):
        await run_to_its_end(work(0))
