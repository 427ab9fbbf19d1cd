"""Values of all ranks, at a point that all of them reach at the same step. There is no way back from it: all must call."""

from typing import Any

import torch


def gathered(value: Any, group: Any) -> list[Any]:
    """The values of all ranks of a torch group on CPUs, by rank."""
    size = torch.distributed.get_world_size(group)
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def first_problem(problems: list[str]) -> str:
    """The first problem of a rank, and whose it is; "" if there is none."""
    alone = len(problems) == 1
    return next((one if alone else f"rank {rank}: {one}" for rank, one in enumerate(problems) if one), "")
