"""Keys and values in slots: slot s owns row s of one preallocated tensor a layer, so nothing is ever moved or copied.

Sequences of different lengths share a forward through a mask; a row beyond a sequence's length holds rejected or old tokens
and is overwritten by the next forward, which is why rejection needs no clean-up.

Tensors: N slots, S positions, K key-value heads, E head size, B sequences, T new tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Where T new tokens of B sequences go. `slots` ascend; `span` is how many positions the forward looks at."""

    slots: tuple[int, ...]
    positions_BT: Tensor
    """int64, position of each new token."""
    rows: Tensor
    """int64 [B * T], slot * S + position: where keys and values are written."""
    gather: Tensor | None
    """int64 [B]: slots to read; None when they are 0..B-1, whose keys are read in place."""
    mask_BTS: Tensor | None
    """Additive, span columns; None for one sequence whose single new token sees everything."""
    span: int


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
        self._keys = like.new_zeros(
            (shape.num_layers, shape.num_slots, shape.num_positions, shape.num_kv_heads, shape.head_dim)
        )
        self._values = torch.zeros_like(self._keys)
        self.num_positions = shape.num_positions

    def batch(self, slots: list[int], starts: list[int], num_new: int) -> Batch:
        """Plan a forward of `num_new` tokens for each of `slots` (ascending), beginning at position `starts[i]`."""
        device, dtype = self._keys.device, self._keys.dtype
        start_B = torch.tensor(starts)
        slot_B = torch.tensor(slots)
        positions = start_B[:, None] + torch.arange(num_new)
        span = int(start_B.max()) + num_new
        assert span <= self.num_positions, f"positions up to {span} do not fit a slot of {self.num_positions}"
        mask = None
        if len(slots) > 1 or num_new > 1:
            hidden = torch.arange(span)[None, None] > positions[..., None]
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).to(device)
        dense = slots == list(range(len(slots)))
        return Batch(
            slots=tuple(slots),
            positions_BT=positions.to(device),
            rows=(slot_B[:, None] * self.num_positions + positions).flatten().to(device),
            gather=None if dense else slot_B.to(device),
            mask_BTS=mask,
            span=span,
        )

    def write(self, layer: int, batch: Batch, k_BTKE: Tensor, v_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values; return all of the batch's, each [B, span, K, E]."""
        return (
            self._store(self._keys[layer], batch, k_BTKE),
            self._store(self._values[layer], batch, v_BTKE),
        )

    @staticmethod
    def _store(cache_NSKE: Tensor, batch: Batch, new_BTKE: Tensor) -> Tensor:
        tail = cache_NSKE.shape[2:]
        cache_NSKE.view(-1, *tail).index_copy_(0, batch.rows, new_BTKE.reshape(-1, *tail))
        if batch.gather is None:
            return cache_NSKE[: len(batch.slots), : batch.span]
        return cache_NSKE[batch.gather, : batch.span]
