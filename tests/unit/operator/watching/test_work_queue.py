"""The queue: each speculator once, never twice at the same time, and again after a failure."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.operator.virtual_time import LoopClock, run

from updraft_operator.planning.objects import Key
from updraft_operator.watching.work_queue import WorkQueue

A, B, C = Key("team", "a"), Key("team", "b"), Key("team", "c")


def _work() -> WorkQueue:
    return WorkQueue(LoopClock().monotonic)


async def _nothing_for(work: WorkQueue, seconds: float) -> bool:
    """Whether nothing is to be done for so long."""
    try:
        async with asyncio.timeout(seconds):
            key, _ = await work.take()
    except TimeoutError:
        return True
    work.add(key)
    work.done(key)
    return False


def test_what_is_mentioned_often_is_looked_at_once() -> None:
    async def main() -> None:
        work = _work()
        for key in (A, B, A, A, B):
            work.add(key)
        assert len(work) == 2
        assert [(await work.take())[0] for _ in range(2)] == [A, B]
        assert await _nothing_for(work, 1.0)

    run(main())


def test_a_change_does_not_wait_for_measurements() -> None:
    async def main() -> None:
        work = _work()
        work.add_measured(A)
        work.add_measured(B)
        work.add(C)
        work.add(B)
        order = []
        for _ in range(3):
            key, _ = await work.take()
            order.append((key, work.take_need_of_plan(key)))
            work.done(key)
        assert order == [(C, True), (B, True), (A, False)]

    run(main())


def test_a_change_does_not_wait_for_a_resync() -> None:
    async def main() -> None:
        work, others = _work(), [Key("team", f"other-{number}") for number in range(1000)]
        work.add_spread(others, 150.0)
        seen = []
        for _ in range(20):
            key, _ = await work.take()
            seen.append(key)
            work.done(key)
        work.add(A)
        assert (await work.take())[0] == A
        seen += [(await work.take())[0] for _ in range(980)]
        assert seen == others
        assert await _nothing_for(work, 1.0)

    run(main())


@pytest.mark.parametrize(
    ("number", "within_s", "taken_s"), [(2, 150.0, 0.05), (1000, 150.0, 49.95), (10_000, 150.0, 149.985)]
)
def test_a_resync_is_planned_within_its_time(number: int, within_s: float, taken_s: float) -> None:
    async def main() -> None:
        work, began_s = _work(), asyncio.get_running_loop().time()
        work.add_spread([Key("team", f"other-{each}") for each in range(number)], within_s)
        for _ in range(number):
            await work.take()
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(taken_s)

    run(main())


def test_the_wait_counts_from_the_first_mention() -> None:
    async def main() -> None:
        work = _work()
        work.add(A)
        await asyncio.sleep(2.0)
        work.add(A)
        await asyncio.sleep(1.0)
        assert (await work.take())[1] == pytest.approx(3.0)

    run(main())


def test_what_is_mentioned_during_the_work_is_looked_at_again_afterwards() -> None:
    async def main() -> None:
        work = _work()
        work.add(A)
        key, _ = await work.take()
        work.add(A)
        work.add(A)
        assert await _nothing_for(work, 1.0)
        work.done(key)
        assert (await work.take())[0] == A
        work.done(A)
        assert await _nothing_for(work, 1.0)

    run(main())


def test_a_worker_that_waits_is_woken() -> None:
    async def main() -> None:
        work = _work()
        async with asyncio.TaskGroup() as tasks:
            taken = tasks.create_task(work.take())
            await asyncio.sleep(5.0)
            work.add(A)
        assert taken.result() == (A, 0.0)

    run(main())


def test_later_is_not_sooner() -> None:
    async def main() -> None:
        work = _work()
        work.add_after(A, 10.0)
        assert await _nothing_for(work, 9.9)
        assert (await work.take())[0] == A

    run(main())


@pytest.mark.parametrize("delays", [(10.0, 3.0), (3.0, 10.0)])
def test_the_earliest_of_two_wishes_counts(delays: tuple[float, float]) -> None:
    async def main() -> None:
        work, start_s = _work(), LoopClock().monotonic()
        for delay_s in delays:
            work.add_after(A, delay_s)
        await work.take()
        work.done(A)
        assert LoopClock().monotonic() - start_s == pytest.approx(3.0)
        assert await _nothing_for(work, 60.0)

    run(main())


def test_a_wish_that_comes_due_during_the_work_is_kept() -> None:
    async def main() -> None:
        work = _work()
        work.add(A)
        await work.take()
        work.add_after(A, 1.0)
        assert await _nothing_for(work, 5.0)
        work.done(A)
        assert (await work.take())[0] == A

    run(main())


def test_retries_back_off_until_it_went_well() -> None:
    async def main() -> None:
        work, bounds = _work(), [0.5 * 2**n for n in range(8)]
        for bound_s in bounds:
            start_s = LoopClock().monotonic()
            work.retry(A)
            await work.take()
            work.done(A)
            assert LoopClock().monotonic() - start_s <= min(60.0, bound_s) + 0.001
        work.forget(A)
        start_s = LoopClock().monotonic()
        work.retry(A)
        await work.take()
        assert LoopClock().monotonic() - start_s <= 0.501

    run(main())


def test_a_retry_waits_as_long_as_the_server_asks() -> None:
    async def main() -> None:
        work, start_s = _work(), LoopClock().monotonic()
        work.retry(A, at_least_s=30.0)
        await work.take()
        assert LoopClock().monotonic() - start_s >= 30.0

    run(main())


def test_a_failure_delays_nobody_else() -> None:
    async def main() -> None:
        work, start_s = _work(), LoopClock().monotonic()
        work.retry(A, at_least_s=30.0)
        work.add(B)
        assert (await work.take())[0] == B
        assert LoopClock().monotonic() == start_s

    run(main())


def test_news_come_before_a_retry_is_due() -> None:
    async def main() -> None:
        work = _work()
        work.retry(A, at_least_s=30.0)
        work.add(A)
        assert await work.take() == (A, 0.0)

    run(main())


mentions = st.lists(
    st.tuples(
        st.sampled_from([A, B, C]),
        st.sampled_from(["add", "later", "retry"]),
        st.floats(0.0, 3.0),
    ),
    max_size=25,
)


def test_measurements_alone_need_no_plan() -> None:
    async def main() -> None:
        work = _work()
        work.add_measured(A)
        work.add_measured(B)
        work.add(B)
        taken = [(await work.take())[0] for _ in range(2)]
        assert [(key, work.take_need_of_plan(key)) for key in taken] == [(B, True), (A, False)]
        work.add(A)  # while it is refreshed
        work.done(A)
        assert [(await work.take())[0], work.take_need_of_plan(A)] == [A, True]
        assert not work.take_need_of_plan(B)

    run(main())


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_a_plan_that_is_due_later_is_not_lost_to_a_status_that_is_due_sooner(order: tuple[bool, bool]) -> None:
    async def main() -> None:
        work = _work()
        for needs_plan in order:
            work.add_after(A, 20.0 if needs_plan else 10.0, needs_plan=needs_plan)
        needs = []
        for _ in range(2):
            key, _ = await work.take()
            needs.append(work.take_need_of_plan(key))
            work.done(key)
        assert needs == [False, True]

    run(main())


@settings(deadline=None, max_examples=60)
@given(additions=mentions, num_workers=st.integers(1, 4), work_s=st.floats(0.0, 2.0))
def test_every_mention_is_followed_by_a_look_and_no_key_is_looked_at_twice_at_once(
    additions: list[tuple[Key, str, float]], num_workers: int, work_s: float
) -> None:
    async def main() -> None:
        work, running = _work(), set[Key]()
        started: dict[Key, float] = {}
        ways: dict[str, Callable[[Key], None]] = {
            "add": work.add,
            "later": lambda key: work.add_after(key, 1.5),
            "retry": work.retry,
        }
        mentioned: dict[Key, float] = {}

        async def worker() -> None:
            while True:
                key, _ = await work.take()
                assert key not in running
                running.add(key)
                started[key] = LoopClock().monotonic()
                await asyncio.sleep(work_s)
                running.discard(key)
                work.done(key)

        async with asyncio.TaskGroup() as tasks:
            workers = [tasks.create_task(worker()) for _ in range(num_workers)]
            for key, how, after_s in additions:
                await asyncio.sleep(after_s)
                mentioned[key] = LoopClock().monotonic()
                ways[how](key)
            await asyncio.sleep(100.0 + 10 * work_s * len(additions))
            for each in workers:
                each.cancel()
        assert started.keys() == mentioned.keys()
        assert all(started[key] >= mentioned[key] for key in mentioned)
        assert len(work) == 0

    run(main())
