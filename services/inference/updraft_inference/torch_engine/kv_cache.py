"""Keys and values in slots: slot s owns row s of one preallocated tensor a layer, so nothing is ever moved or copied.

Sequences of different lengths share a forward through a mask; a row beyond a sequence's length holds rejected or old tokens
and is overwritten by the next forward, which is why rejection needs no clean-up.

Tensors: N slots, S positions, K key-value heads, E head size, B sequences, R new rows of all of them, T of the one with most.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from updraft_chassis.errors import InvalidInput

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Where the new rows of B sequences go that attend together. `slots` ascend; `span` is how many positions they look at.

    Rows are flat, those of a sequence together; only attention sees them as [B, T], where short sequences repeat their
    last row. So what is much longer than others belongs in a batch of its own, and a forward takes several.
    """

    slots: tuple[int, ...]
    positions_R: Tensor
    """int64, position of each row."""
    rows_R: Tensor
    """int64, slot * S + position: where keys and values are written."""
    gather: Tensor | None
    """int64 [B]: slots to read; None when they follow one another, and their keys are read in place."""
    mask_BTS: Tensor | None
    """Additive, span columns; None for one sequence whose single new token sees everything."""
    span: int
    spread_BT: Tensor | None
    """int64: the row at each place; None if all sequences have T rows."""
    collect_R: Tensor | None
    """int64: the place of each row, in [B * T]; None likewise."""

    def spread(self, x_R: Tensor) -> Tensor:
        """[R, ...] -> [B, T, ...]."""
        if self.spread_BT is None:
            return x_R.view(len(self.slots), -1, *x_R.shape[1:])
        return x_R[self.spread_BT]

    def collect(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] -> [R, ...]."""
        flat = x_BT.flatten(0, 1)
        return flat if self.collect_R is None else flat[self.collect_R]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """Sizes of a slot cache."""

    num_layers: int
    num_slots: int
    num_positions: int
    num_kv_heads: int
    head_dim: int


class SlotCache:
    """[layers, N, S, K, E] keys and as many values, in the dtype and on the device of `like`."""

    def __init__(self, shape: CacheShape, *, like: Tensor) -> None:
        """InvalidInput where there is not so much memory."""
        size = (shape.num_layers, shape.num_slots, shape.num_positions, shape.num_kv_heads, shape.head_dim)
        needed_bytes = 2 * math.prod(size) * like.element_size()
        refusal = InvalidInput(
            f"{shape.num_slots} slots of {shape.num_positions} positions need {needed_bytes / 2**30:.1f} GiB for keys and "
            "values, and there is not so much memory: take fewer slots or a shorter context"
        )
        # A CPU's memory is handed out when it is first touched: what is too much would end the process while it serves.
        if like.device.type == "cpu" and needed_bytes > _memory_bytes():
            raise refusal
        try:
            self._keys, self._values = like.new_zeros(size), like.new_zeros(size)
        except RuntimeError as error:  # torch's words for no memory left, and its OutOfMemoryError
            raise refusal from error
        self.num_positions = shape.num_positions

    def batch(self, slots: list[int], starts: list[int], counts: list[int]) -> Batch:
        """Plan a forward of `counts[i]` rows for each of `slots` (ascending), beginning at position `starts[i]`."""
        device, dtype = self._keys.device, self._keys.dtype
        width, span = max(counts), max(start + count for start, count in zip(starts, counts, strict=True))
        assert span <= self.num_positions, f"positions up to {span} do not fit a slot of {self.num_positions}"
        start_B, slot_B, count_B = torch.tensor([starts, slots, counts])
        offset_BT = torch.minimum(torch.arange(width), count_B[:, None] - 1)
        position_BT = start_B[:, None] + offset_BT
        mask = None
        if len(slots) > 1 or width > 1:
            hidden = torch.arange(span) > position_BT[..., None]
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).to(device)
        spread = collect = None
        position_R, first_R = position_BT.flatten(), slot_B * self.num_positions
        if min(counts) == width:
            first_R = first_R.repeat_interleave(width)
        else:
            collect = (torch.arange(width) < count_B[:, None]).flatten().nonzero()[:, 0]
            spread = (count_B.cumsum(0) - count_B)[:, None] + offset_BT
            position_R, first_R = position_R[collect], first_R.repeat_interleave(count_B)
        return Batch(
            slots=tuple(slots),
            positions_R=position_R.to(device),
            rows_R=(first_R + position_R).to(device),
            gather=None if slots[-1] - slots[0] == len(slots) - 1 else slot_B.to(device),
            mask_BTS=mask,
            span=span,
            spread_BT=None if spread is None else spread.to(device),
            collect_R=None if collect is None else collect.to(device),
        )

    def take_over(self, source: int, slot: int, length: int) -> None:
        """Copy what one slot holds of the first `length` positions into another one."""
        for held in (self._keys, self._values):
            held[:, slot, :length] = held[:, source, :length]

    def wipe(self, slot: int) -> None:
        """Let a slot hold zeros, as at the start."""
        for held in (self._keys, self._values):
            held[:, slot] = 0

    def write(self, layer: int, rows_R: Tensor, k_RKE: Tensor, v_RKE: Tensor) -> None:
        """Store new keys and values where batches say (`rows_R`)."""
        for held, new in ((self._keys, k_RKE), (self._values, v_RKE)):
            held[layer].flatten(0, 1).index_copy_(0, rows_R, new)

    def read(self, layer: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """All keys and values of the batch's sequences, each [B, span, K, E]."""
        slots = slice(batch.slots[0], batch.slots[-1] + 1) if batch.gather is None else batch.gather
        return self._keys[layer][slots, : batch.span], self._values[layer][slots, : batch.span]


def _memory_bytes() -> int:
    """All that this machine, or this container, has."""
    of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return of_machine
    return min(of_machine, int(limit)) if limit.isdecimal() else of_machine
