"""Ridge regression in the form that is smaller: from sums of products, or from the rows themselves if they are few.

The size of the sums does not depend on the number of rows. Sums of different rows, kinds of traffic or ranks add up to those of
all rows. With fewer rows than inputs, the dual form (Saunders, Gammerman and Vovk 1998) solves for one number per row and
output instead, and has the same solution. At D 4096, the 2,000 rows of eight requests take 160 MB and 5 s of a core in this
form; the sums of their 16,384 inputs take 2.4 GB and 55 s.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

RIDGE = 0.1
"""Relative to each input's sum of squares, so that inputs of any scale count alike."""

Rows = tuple[Tensor, Tensor]
"""Inputs [N, I] and outputs [N, O], of any floating dtype and on any device."""


class Regression(Protocol):
    """Rows in the form that a solution needs: float32, on one device."""

    def solve(self) -> Tensor:
        """[I, O]. Raises RuntimeError if the rows are not finite."""
        ...

    def solve_low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors [I, rank] and [rank, O] of the solution whose predictions lose least."""
        ...


def regression(
    parts: Iterable[Rows], num_rows: int, num_inputs: int, num_outputs: int, device: torch.device | None = None
) -> Regression:
    """The regression of all parts, which have so many rows together, in the smaller form."""
    if num_rows < num_inputs:
        return Stacked.of(parts, num_rows, num_inputs, num_outputs, device)
    return Sums.of(parts, num_inputs, num_outputs, device)


@dataclass(frozen=True, slots=True)
class Sums:
    """X'X [I, I] and X'Y [I, O]."""

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
        factor = self.xx.clone().mT  # by columns, so that it is factored in place: at D 4096 it takes 1 GB
        diagonal = factor.diagonal()
        diagonal.add_(_penalty(diagonal))
        torch.linalg.cholesky(factor, out=factor)
        return torch.cholesky_solve(self.xy, factor)

    def solve_low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        whole = self.solve()
        top = _largest(whole.T @ self.xx @ whole, rank)
        return whole @ top, top.T


@dataclass(frozen=True, slots=True)
class Stacked:
    """All rows: inputs [N, I], divided by `scale` [I], the square root of their penalties; outputs [N, O]."""

    x: Tensor
    y: Tensor
    scale: Tensor

    @classmethod
    def of(
        cls,
        parts: Iterable[Rows],
        num_rows: int,
        num_inputs: int,
        num_outputs: int,
        device: torch.device | None = None,
    ) -> Self:
        """The rows of all parts, `num_rows` together, which are copied one part at a time."""
        x_NI = torch.zeros(num_rows, num_inputs, device=device)
        y_NO = torch.zeros(num_rows, num_outputs, device=device)
        start = 0
        for x, y in parts:
            end = start + len(x)
            x_NI[start:end], y_NO[start:end] = x, y
            start = end
        scale = _penalty(torch.linalg.vector_norm(x_NI, dim=0).square()).sqrt()
        scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)
        return cls(x_NI.div_(scale), y_NO, scale)

    def solve(self) -> Tensor:
        return self._weights(self._residuals())

    def solve_low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        residuals = self._residuals()
        predictions = self.y - residuals
        top = _largest(predictions.T @ predictions, rank)
        return self._weights(residuals @ top), top.T

    def _residuals(self) -> Tensor:
        """The outputs minus the predictions, [N, O], which are the dual solution."""
        if not bool(self.scale.isfinite().all()):
            raise RuntimeError("the squares of the rows are not finite")
        gram = (self.x @ self.x.T).mT
        gram.diagonal().add_(1.0)
        torch.linalg.cholesky(gram, out=gram)
        return torch.cholesky_solve(self.y, gram)

    def _weights(self, duals: Tensor) -> Tensor:
        weights: Tensor = self.x.T @ duals
        weights /= self.scale[:, None]
        return weights


def _penalty(squares: Tensor) -> Tensor:
    """The ridge penalty of each input, [I], from its sum of squares."""
    return RIDGE * (squares + 1e-6 * squares.mean())


def _largest(covariance: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the `rank` largest eigenvalues, as columns."""
    vectors: Tensor = torch.linalg.eigh(covariance).eigenvectors
    return vectors[:, -rank:]
