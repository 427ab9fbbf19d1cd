"""The gradients of one step, summed over the ranks once, after each has added up those of its own passes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from updraft_trainer.coordination.ranks import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A rank's part of a step: the sum of its weighted losses, float32 [], its number of rows, and the sum of their weights. A
    rank without samples has none, and one whose samples did not fit its memory neither."""

    loss: Tensor
    num_rows: int = 0
    weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """The sum of all shares. `left_out`: ranks whose loss or gradients were not finite, so that they added nothing. If no rank
    added anything, the loss is NaN if one was left out, else 0."""

    loss: Tensor
    num_rows: int
    left_out: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether no rank trained on a row, and all that were computed were finite."""
        return not self.num_rows and not self.left_out


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The result of one optimizer step, the same on all ranks. Loss and gradient norm are 0 if there was no row to train on.

    `is_skipped`: loss or gradient was not finite, or no rank's memory sufficed, so nothing changed. `left_out`: ranks whose
    loss or gradient was not finite, without which the step was done.
    """

    loss: float
    grad_norm: float
    num_rows: int
    is_skipped: bool = False
    left_out: tuple[int, ...] = ()


def summed(ranks: Ranks, parameters: Sequence[nn.Parameter], share: Share, weight: float) -> Total:
    """Replace the gradients by their sum over all ranks, the same bits everywhere.

    `weight`: what all rows of the step together were to weigh. What a rank leaves out is made up for by the others.
    """
    if ranks.size == 1:
        return Total(loss=share.loss, num_rows=share.num_rows)
    gradients = [_gradient(one) for one in parameters]
    loss, norm = torch.stack([share.loss, nn.utils.get_total_norm(gradients)]).tolist()
    is_finite = math.isfinite(loss) and math.isfinite(norm)
    if not is_finite or not share.num_rows:
        for gradient in gradients:
            gradient.zero_()
    figures = torch.zeros(3 + ranks.size, dtype=torch.float64)
    if is_finite:
        figures[:3] = torch.tensor([loss, share.num_rows, share.weight], dtype=torch.float64)
    figures[3 + ranks.rank] = 0.0 if is_finite else 1.0
    ranks.sum([*gradients, figures])
    loss, num_rows, added, *flags = figures.tolist()
    left_out = tuple(rank for rank, flag in enumerate(flags) if flag)
    if not added:
        return Total(loss=share.loss.new_tensor(math.nan if left_out else 0.0), num_rows=0, left_out=left_out)
    factor = weight / added
    if factor != 1.0:
        torch._foreach_mul_(gradients, factor)
    return Total(loss=share.loss.new_tensor(loss * factor), num_rows=int(num_rows), left_out=left_out)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """That of a rank without samples is zero."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
