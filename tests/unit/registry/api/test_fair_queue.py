"""Whoever came first is served first, and only so many at once."""

from updraft_registry.api.fair_queue import Turns


async def test_only_so_many_turns_are_taken_at_once() -> None:
    turns = Turns(2)
    taken = [turns.take() for _ in range(3)]
    assert [turn.done() for turn in taken] == [True, True, False]
    assert turns.num_waiting == 1
    turns.give_back(taken[0])
    assert taken[2].done()
    assert turns.num_waiting == 0


async def test_turns_come_in_the_order_of_asking() -> None:
    turns = Turns(1)
    first, second, third = (turns.take() for _ in range(3))
    turns.give_back(first)
    assert (second.done(), third.done()) == (True, False)


async def test_who_leaves_the_queue_holds_nobody_up() -> None:
    turns = Turns(1)
    first, second, third = (turns.take() for _ in range(3))
    turns.give_back(second)
    assert not third.done()
    turns.give_back(first)
    assert third.done()
    turns.give_back(third)
    assert turns.take().done()
