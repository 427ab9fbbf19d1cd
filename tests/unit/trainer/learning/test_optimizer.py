"""A divided optimizer holds its part of a state that it is given, and leaves the rest to whoever gave it."""

from typing import Any

import torch
from torch import nn

from updraft_trainer.coordination.ranks import ALONE, Ranks
from updraft_trainer.learning.optimizer import MOMENTS, DraftOptimizer

SIZE = 1000


def whole_state() -> dict[str, Any]:
    """After one step of one tensor."""
    weight = nn.Parameter(torch.ones(SIZE))
    optimizer = DraftOptimizer([weight], ALONE, is_sharded=False)
    weight.grad = torch.ones(SIZE)
    optimizer.step(0.1)
    return optimizer.state_dict()


def test_a_rank_keeps_the_memory_of_its_part_only() -> None:
    optimizer = DraftOptimizer([nn.Parameter(torch.ones(SIZE))], Ranks(1, 4), is_sharded=True)
    optimizer.load_state_dict(whole_state())
    (moments,) = optimizer._adamw.state.values()
    assert [moments[name].untyped_storage().nbytes() for name in MOMENTS] == [SIZE] * 2, "a fourth of float32"


def test_moments_are_forgotten_without_a_change_of_the_state_that_they_came_from() -> None:
    weight, state = nn.Parameter(torch.ones(SIZE)), whole_state()
    optimizer = DraftOptimizer([weight], Ranks(0, 2), is_sharded=True)
    optimizer.load_state_dict(state)
    optimizer.forget(weight)
    assert not optimizer.state_dict()["state"]
    assert list(state["state"]) == [0]
