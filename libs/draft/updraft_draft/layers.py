"""Functions that target and draft share: RMS norm, rotary embedding, grouped-query attention.

Tensors: B sequences, T new tokens, S cached tokens, H heads, K key-value heads, G = H / K, E head size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from updraft_artifacts.rope import Rope


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm over the last dimension. The weight is converted, because the fused kernel (float32 inside) needs one dtype."""
    if _keeps_less() and x.device.type == "cpu" and x.dtype != torch.float64:
        out: Tensor = _RmsNorm.apply(x, weight.to(x.dtype), eps)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return out
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def _keeps_less() -> bool:
    """Whether gradients are needed, and torch.compile does not choose what is kept for them."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _RmsNorm(torch.autograd.Function):
    """As torch's, which has no fused kernel on a CPU and keeps two float32 tensors of the size of x for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        normed, d_normed = x.float() * scale, grad.float() * weight
        d_x = d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            mean = torch.linalg.vecdot(d_normed, normed).unsqueeze(-1).div_(x.shape[-1])
            d_x = d_normed.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype)
        return d_x, d_weight, None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. If gradients are needed, nothing but its arguments is kept for them."""
    if not _keeps_less():
        return F.silu(gate) * up
    out: Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def rotary_table(num_positions: int, head_dim: int, rope: Rope) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for `rotate`, each float32 [num_positions, head_dim]."""
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), _frequencies(head_dim, rope))
    cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _frequencies(head_dim: int, rope: Rope) -> Tensor:
    """Radians per position, float32 [head_dim / 2], with the rounding of transformers."""
    periods = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain = 1.0 / periods
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "yarn":
        unscaled = _yarn_unscaled(head_dim, rope)
        return 1.0 / (rope.factor * periods) * (1 - unscaled) + plain * unscaled
    # llama3, by rotations over the original context: few are scaled by the factor, many not at all, in between a blend.
    turns = rope.original_max_position * plain / (2 * math.pi)
    fast = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(plain / rope.factor, plain, fast.clamp(0, 1))


def _yarn_unscaled(head_dim: int, rope: Rope) -> Tensor:
    """The share of each frequency that yarn does not scale, float32 [head_dim / 2], from 1 to 0.

    "NTK-by-parts" of YaRN (arXiv 2309.00071, section 3.2). A frequency with `beta_fast` rotations over the original context is
    not scaled, one with `beta_slow` is scaled by the factor. In between the share falls linearly with the index, as in the
    authors' code and in transformers; in the paper it falls with the number of rotations.
    """
    indices = [
        head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    ]
    if rope.truncate:
        indices = [math.floor(indices[0]), math.ceil(indices[1])]
    first, last = max(indices[0], 0), min(indices[1], head_dim - 1)
    if first == last:
        last += 0.001  # as in transformers: avoids a division by zero
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding in Hugging Face's half-split layout; cos and sin broadcast against x [..., head_dim]."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, torch.cat([x[..., half:], x[..., :half]], -1), sin)


def grouped_attention(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask_BTS: Tensor | None, *, scale: float | None = None
) -> Tensor:
    """Grouped-query attention -> [B, T, H * E]. `mask_BTS` is additive; None attends to everything.

    `scale` of the scores defaults to 1 / sqrt(E). The G query heads of a key-value head become additional rows of it, so that
    keys and values are read in place and never repeated.
    """
    B, T, H, E = q_BTHE.shape
    K = k_BSKE.shape[2]
    G = H // K
    q = q_BTHE.view(B, T, K, G, E).permute(0, 2, 3, 1, 4).reshape(B, K, G * T, E)
    mask = None
    if mask_BTS is not None:
        mask = mask_BTS[:, None, None].expand(-1, 1, G, -1, -1).reshape(mask_BTS.shape[0], 1, G * T, -1)
    out = F.scaled_dot_product_attention(q, k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.view(B, K, G, T, E).permute(0, 3, 1, 2, 4).reshape(B, T, H * E)
