"""The operations of a step other than matrix products, by torch. `native_ops` does the same by the C++ kernels.

Tensors: R rows of all sequences, D hidden, I intermediate, H heads, K key-value heads, E head size, S positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from updraft_draft.layers import grouped_attention, rms_norm, rotate
from updraft_inference.torch_engine.model.kv_cache import Batch, SlotCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The attention heads of one layer. `scale` multiplies the scores. Norms apply per head, [E]; None: no norm."""

    num: int
    num_kv: int
    size: int
    scale: float
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AttentionContext:
    """Where the new rows of batches are, and what they attend to. `cos` and `sin` are [R, E]; `window`: number of positions
    that a row attends to, its own included, 0 for all."""

    batches: Sequence[Batch]
    cos: Tensor
    sin: Tensor
    window: int = 0

    @cached_property
    def parts(self) -> "list[AttentionContext]":
        """One context per batch."""
        if len(self.batches) == 1:
            return [self]
        sizes = [len(batch.rows_R) for batch in self.batches]
        rotations = zip(torch.split(self.cos, sizes), torch.split(self.sin, sizes), strict=True)
        return [
            AttentionContext(batches=[batch], cos=cos, sin=sin, window=self.window)
            for batch, (cos, sin) in zip(self.batches, rotations, strict=True)
        ]

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """The additive mask of each batch."""
        return [self._mask(batch) for batch in self.batches]

    def _mask(self, batch: Batch) -> Tensor | None:
        mask = batch.mask_BTS
        if not self.window or batch.span <= self.window:  # no position is outside of the window
            return mask
        key_positions = torch.arange(batch.span, device=batch.positions_R.device)
        lost = key_positions <= (batch.spread(batch.positions_R) - self.window)[..., None]
        mask = self.cos.new_zeros(lost.shape) if mask is None else mask
        return mask.masked_fill(lost, float("-inf"))


class TopScores(NamedTuple):
    """Per row of logits: the maximum (not finite if any logit is NaN), the first token that has it, and the log-sum-exp,
    float32, where it was requested."""

    best_R: Tensor
    choice_R: Tensor
    log_sum_R: Tensor


class TorchOps:
    """Torch's operations, on any device."""

    pads: bool = True
    """Rows of a batch that attend together are padded to the longest sequence."""

    def add_norm(self, x_RD: Tensor, y_RD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x + y (x if there is no y), and its root-mean-square norm."""
        total = x_RD if y_RD is None else x_RD + y_RD
        return total, rms_norm(total, weight_D, eps)

    def gate(self, gate_up_R2I: Tensor) -> Tensor:
        """silu(gate) * up, [R, I]."""
        gate, up = gate_up_R2I.chunk(2, -1)
        return F.silu(gate) * up

    def top_scores(self, logits_RV: Tensor, is_summed: Sequence[bool]) -> TopScores:
        """Maximum, argmax and log-sum-exp of rows; `is_summed`: the rows that need `log_sum_R`."""
        best_R, choice_R = logits_RV.max(-1)
        log_sum_R = torch.zeros_like(best_R, dtype=torch.float32)
        if any(is_summed):
            rows = [row for row, is_wanted in enumerate(is_summed) if is_wanted]
            log_sum_R[rows] = logits_RV[rows].float().logsumexp(-1)
        return TopScores(best_R, choice_R, log_sum_R)

    def attend(self, qkv: Tensor, heads: Heads, sight: AttentionContext, cache: SlotCache, layer: int) -> Tensor:
        """Write keys and values of the new rows, `qkv` [R, (H + 2K) * E], to the cache, and attend. Returns [R, H * E]."""
        of_keys = heads.num_kv * heads.size
        q, k, v = torch.split(qkv, [heads.num * heads.size, of_keys, of_keys], -1)
        q, k = q.view(-1, heads.num, heads.size), k.view(-1, heads.num_kv, heads.size)
        if heads.q_norm is not None and heads.k_norm is not None:
            q, k = rms_norm(q, heads.q_norm, heads.eps), rms_norm(k, heads.k_norm, heads.eps)
        cos, sin = sight.cos.unsqueeze(1), sight.sin.unsqueeze(1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        cache.write(layer, joined([batch.rows_R for batch in sight.batches]), k, v.view(-1, heads.num_kv, heads.size))
        sizes = [len(batch.rows_R) for batch in sight.batches]
        return joined(
            [
                batch.collect(grouped_attention(batch.spread(own), *cache.read(layer, batch), mask, scale=heads.scale))
                for batch, own, mask in zip(sight.batches, torch.split(q, sizes), sight.masks, strict=True)
            ]
        )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
