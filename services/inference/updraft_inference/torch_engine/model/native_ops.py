"""The operations of a step other than matrix products, by the C++ kernels: one call each where torch needs a dozen.

A decode step of a small model is a thousand operations of microseconds, and torch's overhead per operation is as large as the
operation. Attention also pads no sequence to another, and reads keys and values in place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from updraft_inference.torch_engine.model.kv_cache import Batch, SlotCache
from updraft_inference.torch_engine.model.ops import AttentionContext, Heads, TopScores, TorchOps
from updraft_kernels.loader import Kernels

LANES = 16
"""Head sizes must be multiples of it."""
NARROW, WIDEST = 24, 64
"""Most rows of a sequence that attend here: in any case, and over at most `SHORT` positions. Longer chunks are prompts, for
which matrix products are faster."""
SHORT = 4096
"""Positions. A thread's buffer of scores grows with rows and positions."""


def is_narrow(batch: Batch) -> bool:
    """Whether the kernel attends for a batch."""
    return batch.width <= (WIDEST if batch.span <= SHORT else NARROW)


class NativeOps(TorchOps):
    """For weights and states of one dtype on a CPU, and heads whose size is a multiple of `LANES`."""

    def __init__(self, library: Kernels, dtype: torch.dtype, *, attends: bool = True) -> None:
        """`attends`: attention uses the kernel, not torch."""
        self.pads = not attends
        self._dtype = dtype
        name = str(dtype).removeprefix("torch.")
        self._add_norm = getattr(library, f"add_norm_{name}")
        self._gate = getattr(library, f"silu_and_mul_{name}")
        self._attend = getattr(library, f"attention_{name}")
        self._choices = getattr(library, f"top_scores_{name}")

    def add_norm(self, x_RD: Tensor, y_RD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed = torch.empty_like(x_RD)
        total = x_RD if y_RD is None else torch.empty_like(x_RD)
        self._add_norm(
            x_RD.data_ptr(),
            None if y_RD is None else y_RD.data_ptr(),
            weight_D.data_ptr(),
            total.data_ptr(),
            normed.data_ptr(),
            *x_RD.shape,
            eps,
        )
        return total, normed

    def gate(self, gate_up_R2I: Tensor) -> Tensor:
        rows, both = gate_up_R2I.shape
        out = gate_up_R2I.new_empty(rows, both // 2)
        self._gate(gate_up_R2I.data_ptr(), out.data_ptr(), rows, both // 2)
        return out

    def top_scores(self, logits_RV: Tensor, is_summed: Sequence[bool]) -> TopScores:
        logits_RV = logits_RV.contiguous()
        assert logits_RV.dtype == self._dtype
        rows, vocab = logits_RV.shape
        wanted_R = torch.tensor(is_summed, dtype=torch.bool)
        best_R, log_sum_R = torch.zeros(2, rows)
        choice_R = torch.zeros(rows, dtype=torch.long)
        self._choices(
            logits_RV.data_ptr(),
            wanted_R.data_ptr(),
            best_R.data_ptr(),
            choice_R.data_ptr(),
            log_sum_R.data_ptr(),
            rows,
            vocab,
        )
        return TopScores(best_R, choice_R, log_sum_R)

    def attend(self, qkv: Tensor, heads: Heads, sight: AttentionContext, cache: SlotCache, layer: int) -> Tensor:
        if self.pads:
            return super().attend(qkv, heads, sight, cache, layer)
        out = qkv.new_empty(len(qkv), heads.num * heads.size)
        first = 0
        for part in sight.parts:
            (batch,) = part.batches
            rows = slice(first, first := first + len(batch.rows_R))
            if is_narrow(batch):
                self._attend_narrow(qkv[rows], heads, part, cache, layer, out[rows])
            else:
                out[rows] = super().attend(qkv[rows], heads, part, cache, layer)
        return out

    def _attend_narrow(
        self, qkv: Tensor, heads: Heads, sight: AttentionContext, cache: SlotCache, layer: int, out: Tensor
    ) -> None:
        (batch,) = sight.batches
        keys, values = cache.of_layer(layer)
        assert qkv.is_contiguous()
        assert qkv.dtype == keys.dtype
        has_memory = self._attend(
            qkv.data_ptr(),
            None if heads.q_norm is None else heads.q_norm.data_ptr(),
            None if heads.k_norm is None else heads.k_norm.data_ptr(),
            sight.cos.data_ptr(),
            sight.sin.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            batch.plan_3B.data_ptr(),
            len(batch.slots),
            heads.num_kv,
            heads.num // heads.num_kv,
            heads.size,
            cache.num_positions,
            sight.window,
            heads.scale,
            heads.eps,
        )
        if not has_memory:
            raise RuntimeError("no memory for attention")  # the type that torch raises


def operations(library: Kernels | None, *, like: Tensor, head_dim: int) -> TorchOps:
    """The fastest operations for such tensors and heads."""
    is_fit = like.device.type == "cpu" and like.dtype in (torch.float32, torch.bfloat16) and head_dim % LANES == 0
    if library is None or not is_fit:
        return TorchOps()
    return NativeOps(library, like.dtype, attends=library.has_wide_vectors)
