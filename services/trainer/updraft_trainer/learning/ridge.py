"""Ridge regression from sums of products.

Their size does not depend on the number of rows. Sums of different rows, kinds of traffic or ranks add up to those of all rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

RIDGE = 0.1
"""Relative to each input's sum of squares, so that inputs of any scale count alike."""

Rows = tuple[Tensor, Tensor]
"""Inputs [N, I] and outputs [N, O], of any floating dtype and on any device."""


@dataclass(frozen=True, slots=True)
class Sums:
    """X'X [I, I] and X'Y [I, O], float32 on one device, which solves them."""

    xx: Tensor
    xy: Tensor

    @classmethod
    def of(cls, parts: Iterable[Rows], num_inputs: int, num_outputs: int, device: torch.device | None = None) -> Self:
        """The sums of all parts, of which one is in memory at a time if `parts` makes them one by one."""
        xx = torch.zeros(num_inputs, num_inputs, device=device)
        xy = torch.zeros(num_inputs, num_outputs, device=device)
        for x, y in parts:
            x_NI, y_NO = x.to(xx), y.to(xy)
            xx.addmm_(x_NI.T, x_NI)
            xy.addmm_(x_NI.T, y_NO)
        return cls(xx, xy)

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.xx + other.xx, self.xy + other.xy)

    def solve(self) -> Tensor:
        """[I, O]. Raises RuntimeError if the sums are not finite."""
        factor = self.xx.clone().mT  # by columns, so that it is factored in place: at D 4096 it takes 1 GB
        diagonal = factor.diagonal()
        diagonal.add_(RIDGE * (diagonal + 1e-6 * diagonal.mean()))
        torch.linalg.cholesky(factor, out=factor)
        return torch.cholesky_solve(self.xy, factor)

    def solve_low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors [I, rank] and [rank, O] of the solution whose predictions lose least."""
        whole = self.solve()
        _, vectors = torch.linalg.eigh(whole.T @ self.xx @ whole)
        top = vectors[:, -rank:]
        return whole @ top, top.T
