"""Keys and values in slots: slot s owns row s of one preallocated tensor per layer, so nothing is moved while it runs.

Sequences of different lengths share a forward through a mask. A position beyond a sequence's length holds rejected or old
tokens and is overwritten by the next forward, so a rejection needs no clean-up.

Tensors: N slots, S positions, K key-value heads, E head size, B sequences, R new rows of all of them, T of the one with most.
"""

import math
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from updraft_chassis.errors import InvalidInput

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Where the new rows of B sequences go that attend together. `slots` ascend; `span`: number of positions they attend to.

    Rows are flat, sequence by sequence. Where attention needs them as [B, T], short sequences repeat their last row, so a much
    longer sequence belongs in a batch of its own. A forward takes several batches.
    """

    slots: tuple[int, ...]
    plan_3B: Tensor
    """int64 [3, B] on the CPU: slots, first positions and numbers of new rows."""
    positions_R: Tensor
    """int64 [R]: the position of each row."""
    rows_R: Tensor
    """int64 [R]: slot * S + position, where keys and values are written."""
    span: int
    width: int
    """T."""
    dtype: torch.dtype

    @cached_property
    def gather(self) -> Tensor | None:
        """int64 [B]: slots to read; None if they are consecutive, and keys are read in place."""
        are_dense = self.slots[-1] - self.slots[0] == len(self.slots) - 1
        return None if are_dense else self.plan_3B[0].to(self.rows_R.device)

    @cached_property
    def mask_BTS(self) -> Tensor | None:
        """Additive [B, T, span]; None for a sequence whose single new token attends to everything."""
        if len(self.slots) == self.width == 1:
            return None
        hidden = torch.arange(self.span) > (self.plan_3B[1][:, None] + self._offset_BT)[..., None]
        return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, float("-inf")).to(self.rows_R.device)

    @cached_property
    def spread_BT(self) -> Tensor | None:
        """int64 [B, T]: the row at each place; None if all sequences have T rows."""
        count_B = self.plan_3B[2]
        if int(count_B.min()) == self.width:
            return None
        return ((count_B.cumsum(0) - count_B)[:, None] + self._offset_BT).to(self.rows_R.device)

    @cached_property
    def collect_R(self) -> Tensor | None:
        """int64 [R]: the place of each row in [B * T]; None likewise."""
        if self.spread_BT is None:
            return None
        is_row_BT = torch.arange(self.width) < self.plan_3B[2][:, None]
        return is_row_BT.flatten().nonzero()[:, 0].to(self.rows_R.device)

    @property
    def _offset_BT(self) -> Tensor:
        """int64 [B, T]: the row of its sequence at each place."""
        return torch.minimum(torch.arange(self.width), self.plan_3B[2][:, None] - 1)

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
    num_layers: int
    num_slots: int
    num_positions: int
    num_kv_heads: int
    head_dim: int


class SlotCache:
    """Keys and values, [layers, N, S, K, E] each, in the dtype and on the device of `like`."""

    def __init__(self, shape: CacheShape, *, like: Tensor) -> None:
        """InvalidInput if there is not enough memory."""
        size = (shape.num_layers, shape.num_slots, shape.num_positions, shape.num_kv_heads, shape.head_dim)
        needed_bytes = 2 * math.prod(size) * like.element_size()
        refusal = InvalidInput(
            f"{shape.num_slots} slots of {shape.num_positions} positions need {needed_bytes / 2**30:.1f} GiB for keys and "
            "values, and there is not so much memory: take fewer slots or a shorter context"
        )
        # A CPU's memory is allocated on first use, so too much would kill the process while it serves.
        if like.device.type == "cpu" and needed_bytes > _memory_bytes():
            raise refusal
        try:
            self._keys, self._values = _zeros(size, like), _zeros(size, like)
        except (RuntimeError, OSError) as error:  # torch's errors for no memory left, and the mapping's
            raise refusal from error
        self.num_slots, self.num_positions = shape.num_slots, shape.num_positions
        self._num_written = [0] * shape.num_slots
        """Per slot, the end of the positions planned since the last wipe, which are all that `wipe` has to clear."""

    def batch(self, slots: list[int], starts: list[int], counts: list[int]) -> Batch:
        """Plan a forward of `counts[i]` rows for each of `slots` (ascending), beginning at position `starts[i]`."""
        assert slots == sorted(slots)
        spans = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
        span = max(positions.stop for positions in spans)
        if span > self.num_positions:
            raise IndexError(f"positions up to {span} do not fit a slot of {self.num_positions}")
        for slot, positions in zip(slots, spans, strict=True):
            self._num_written[slot] = max(self._num_written[slot], positions.stop)
        rows = [
            slot * self.num_positions + at for slot, positions in zip(slots, spans, strict=True) for at in positions
        ]
        device = self._keys.device
        return Batch(
            slots=tuple(slots),
            plan_3B=torch.tensor([slots, starts, counts]),
            positions_R=torch.tensor([at for positions in spans for at in positions], device=device),
            rows_R=torch.tensor(rows, device=device),
            span=span,
            width=max(counts),
            dtype=self._keys.dtype,
        )

    def copy_prefix(self, source: int, slot: int, length: int) -> None:
        """Copy what one slot holds of the first `length` positions into another one."""
        for held in (self._keys, self._values):
            held[:, slot, :length] = held[:, source, :length]
        self._num_written[slot] = max(self._num_written[slot], length)

    def wipe(self, slot: int) -> None:
        """Let a slot hold zeros, as at the start."""
        for held in (self._keys, self._values):
            held[:, slot, : self._num_written[slot]] = 0
        self._num_written[slot] = 0

    def write(self, layer: int, rows_R: Tensor, k_RKE: Tensor, v_RKE: Tensor) -> None:
        """Store new keys and values where batches say (`rows_R`)."""
        for held, new in ((self._keys, k_RKE), (self._values, v_RKE)):
            held[layer].flatten(0, 1).index_copy_(0, rows_R, new)

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and all values of a layer, each [N, S, K, E]."""
        return self._keys[layer], self._values[layer]

    def read(self, layer: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """All keys and values of the batch's sequences, each [B, span, K, E]."""
        slots = slice(batch.slots[0], batch.slots[-1] + 1) if batch.gather is None else batch.gather
        return self._keys[layer][slots, : batch.span], self._values[layer][slots, : batch.span]


def _zeros(size: tuple[int, ...], like: Tensor) -> Tensor:
    """On a CPU, pages that take no memory before they are written: most requests are shorter than their slot."""
    if like.device.type != "cpu":
        return like.new_zeros(size)
    num_bytes = math.prod(size) * like.element_size()
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(size)


def _memory_bytes() -> int:
    """All that this machine, or this container, has."""
    of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return of_machine
    return min(of_machine, int(limit)) if limit.isdecimal() else of_machine
