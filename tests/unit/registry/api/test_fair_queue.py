"""Whoever came first is served first, and only so many at once."""

from updraft_registry.api.fair_queue import FairQueue


async def test_only_so_many_turns_are_taken_at_once() -> None:
    queue = FairQueue(2)
    taken = [queue.acquire() for _ in range(3)]
    assert [place.done() for place in taken] == [True, True, False]
    assert queue.num_waiting == 1
    queue.release(taken[0])
    assert taken[2].done()
    assert queue.num_waiting == 0


async def test_turns_come_in_the_order_of_asking() -> None:
    queue = FairQueue(1)
    first, second, third = (queue.acquire() for _ in range(3))
    queue.release(first)
    assert (second.done(), third.done()) == (True, False)


async def test_who_leaves_the_queue_holds_nobody_up() -> None:
    queue = FairQueue(1)
    first, second, third = (queue.acquire() for _ in range(3))
    queue.release(second)
    assert not third.done()
    queue.release(first)
    assert third.done()
    queue.release(third)
    assert queue.acquire().done()
