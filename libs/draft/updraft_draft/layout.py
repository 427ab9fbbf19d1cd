"""Texts packed into one sequence of rows, of which each attends to its own text only.

A row needs a query only if it is unrolled. Where rows attend to is written as ranges, not as a mask: a mask of 32,768 rows
has a billion entries.

Tensors: N rows of all texts, U unrolled rows, J draft steps.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `first` to `end`, which are unrolled. Each attends to rows `context` to `context_end`, and to the span up to
    itself."""

    first: int
    end: int
    context: int = 0
    context_end: int = 0

    def __len__(self) -> int:
        return self.end - self.first


class Layout(NamedTuple):
    """ids int64 [N, J]: the J tokens after each row in its text. positions int64 [N] of the row in its text, below `limit` - J.

    Unrolled states have the order of the spans.
    """

    ids: Tensor
    positions: Tensor
    spans: tuple[Span, ...]
    limit: int

    @classmethod
    def of_texts(cls, ids_BT: Tensor, *, num_steps: int, first_row: int = 0) -> Self:
        """B texts of T rows, unrolled from `first_row` on. `ids_BT` as for `DraftNetwork.unroll`: T + num_steps - 1 columns."""
        B, T = ids_BT.shape[0], ids_BT.shape[1] - num_steps + 1
        return cls(
            ids=ids_BT.unfold(1, num_steps, 1).flatten(0, 1),
            positions=torch.arange(T, device=ids_BT.device).repeat(B),
            spans=tuple(Span(b * T + first_row, (b + 1) * T, b * T, b * T + first_row) for b in range(B)),
            limit=T + num_steps,
        )

    @property
    def num_unrolled(self) -> int:
        """U."""
        return sum(map(len, self.spans))

    @property
    def unrolled(self) -> Tensor:
        """The unrolled rows, int64 [U]."""
        rows = torch.cat([torch.arange(span.first, span.end) for span in self.spans])
        return rows.to(self.ids.device, non_blocking=True)

    def to(self, device: torch.device) -> Self:
        ids, positions = (one.to(device, non_blocking=True) for one in (self.ids, self.positions))
        return self._replace(ids=ids, positions=positions)


def slices(spans: tuple[Span, ...]) -> list[slice]:
    """Where the unrolled states of each span are."""
    ends = list(accumulate(map(len, spans)))
    return [slice(end - len(span), end) for span, end in zip(spans, ends, strict=True)]
