"""A target over a slot KV cache: one forward for any mix of sequences and of new tokens of each.

The forward is Llama's. Where another family does more, its layers hold a tensor that Llama's do not, so that nobody pays for
what only others need. A sliding window is a mask over the whole cache: exact, and no smaller cache.

Every forward also yields what learning needs: the auxiliary states and the last hidden state of each row.

Tensors: R new rows of all sequences, D hidden, H heads, K key-value heads, E head size, A auxiliary, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from updraft_chassis.errors import InvalidInput
from updraft_draft.config import Family, TargetConfig
from updraft_draft.layers import grouped_attention, rms_norm, rotary_table, rotate
from updraft_draft.rope import Rope
from updraft_draft.target_weights import EMBEDDING, FINAL_NORM, HEAD, norm_weight, read_tensors
from updraft_inference.torch_engine.kv_cache import Batch, SlotCache
from updraft_inference.torch_engine.linear import Linear


class Forward(NamedTuple):
    """aux [R, A] (auxiliary states, concatenated) and last [R, D] (after the final norm)."""

    aux: Tensor
    last: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Weights of one decoder layer; projections that read the same input are joined. None: this family has none."""

    is_sliding: bool
    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    attention_norm: Tensor | None
    """Of what attention gives."""
    mlp_input_norm: Tensor
    gate_up: Linear
    down: Linear
    mlp_norm: Tensor | None
    """Of what the MLP gives."""


class _Sight(NamedTuple):
    """Where new tokens are and what they see, for one kind of layer: rotation [R, 1, E] and additive mask [B, T, S]."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None


class Target:
    """The frozen model. Not thread-safe: one engine thread owns it."""

    def __init__(
        self,
        config: TargetConfig,
        tensors: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_positions: int | None = None,
    ) -> None:
        """`num_positions`: as many will be used; None: as many as the model knows, which may be a million."""
        weights = _Weights(tensors, config.family, dtype, device)
        self.config = config
        self.embedding = weights.joined(EMBEDDING)
        self._head = Linear(self.embedding if config.is_tied else weights.joined(HEAD))
        self._final_norm = weights.norm(FINAL_NORM)
        self._layers = [_layer(weights, config, i) for i in range(config.num_layers)]
        self._activation = _ACTIVATIONS[config.activation]
        self._embedding_scale = self.embedding.new_tensor(config.hidden_size**0.5)
        ropes = {False: config.rope, True: config.sliding_rope}
        num_positions = min(config.max_position, num_positions or config.max_position)
        tables = {rope: self._table(num_positions, rope) for rope in set(ropes.values())}
        self._tables = {layer.is_sliding: tables[ropes[layer.is_sliding]] for layer in self._layers}
        """Cosines and sines by `is_sliding`, for the kinds of layers that there are."""

    def _table(self, num_positions: int, rope: Rope) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_table(num_positions, self.config.head_dim, rope)
        return cos.to(self.embedding), sin.to(self.embedding)

    @classmethod
    def open(cls, folder: Path, *, dtype: torch.dtype, device: torch.device, num_positions: int | None = None) -> Self:
        """Read a Hugging Face folder. InvalidInput if it is none, or of no family that runs here."""
        config = TargetConfig.from_folder(folder)
        try:
            return cls(config, read_tensors(folder), dtype=dtype, device=device, num_positions=num_positions)
        except KeyError as error:
            raise InvalidInput(f"{folder} lacks the tensor {error}") from None

    @torch.inference_mode()
    def forward(self, ids_R: Tensor, batch: Batch, cache: SlotCache) -> Forward:
        """Run the new tokens `ids_R` of `batch`, writing their keys and values into `cache`."""
        c = self.config
        x = F.embedding(ids_R, self.embedding)
        if c.family.is_embedding_scaled:
            x = x * self._embedding_scale
        sights = {is_sliding: self._sight(batch, is_sliding=is_sliding) for is_sliding in self._tables}
        aux: list[Tensor] = []
        split = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
        for i, layer in enumerate(self._layers):
            if i in c.aux_layers:
                aux.append(x)
            cos, sin, mask = sights[layer.is_sliding]
            q, k, v = torch.split(layer.qkv(rms_norm(x, layer.input_norm, c.rms_norm_eps)), split, -1)
            q, k = q.view(-1, c.num_heads, c.head_dim), k.view(-1, c.num_kv_heads, c.head_dim)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = rms_norm(q, layer.q_norm, c.rms_norm_eps), rms_norm(k, layer.k_norm, c.rms_norm_eps)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            keys, values = cache.write(i, batch, k, v.view(-1, c.num_kv_heads, c.head_dim))
            attended = batch.collect(grouped_attention(batch.spread(q), keys, values, mask, scale=c.attention_scale))
            x = self._add(x, layer.o(attended), layer.attention_norm)
            gate, up = layer.gate_up(rms_norm(x, layer.mlp_input_norm, c.rms_norm_eps)).chunk(2, -1)
            x = self._add(x, layer.down(self._activation(gate) * up), layer.mlp_norm)
        return Forward(torch.cat(aux, -1), rms_norm(x, self._final_norm, c.rms_norm_eps))

    def _add(self, x: Tensor, y: Tensor, norm: Tensor | None) -> Tensor:
        return x + (y if norm is None else rms_norm(y, norm, self.config.rms_norm_eps))

    def _sight(self, batch: Batch, *, is_sliding: bool) -> _Sight:
        cos, sin = self._tables[is_sliding]
        mask = batch.mask_BTS
        if is_sliding and batch.span > self.config.window:  # else everything is within reach
            key_positions = torch.arange(batch.span, device=cos.device)
            lost = key_positions <= (batch.spread(batch.positions_R) - self.config.window)[..., None]
            mask = cos.new_zeros(lost.shape) if mask is None else mask
            mask = mask.masked_fill(lost, float("-inf"))
        return _Sight(cos[batch.positions_R].unsqueeze(1), sin[batch.positions_R].unsqueeze(1), mask)

    @torch.inference_mode()
    def logits(self, last: Tensor) -> Tensor:
        """Logits [..., V] of last hidden states [..., D]."""
        return self._head(last)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class _Weights:
    """A model's file as the engine wants it. Copies: `tensors` is a mapped file that is let go, and never in memory twice."""

    tensors: Mapping[str, Tensor]
    family: Family
    dtype: torch.dtype
    device: torch.device

    def joined(self, *names: str) -> Tensor:
        return torch.cat([self.tensors[name].to(self.device, self.dtype) for name in names])

    def norm(self, name: str) -> Tensor:
        return norm_weight(self.tensors[name], self.family).to(self.device, self.dtype, copy=True)


def _layer(weights: _Weights, config: TargetConfig, index: int) -> _Layer:
    family, p = config.family, f"model.layers.{index}."
    has_qkv_bias = family.has_qkv_bias or config.has_attention_bias
    # Llama names the norm before its MLP after what comes before it; where that has a norm of its own, the name is taken.
    mlp_input_norm = "pre_feedforward_layernorm" if family.has_output_norms else "post_attention_layernorm"

    def linear(*names: str, has_bias: bool = False) -> Linear:
        bias = weights.joined(*(f"{p}{name}.bias" for name in names)) if has_bias else None
        return Linear(weights.joined(*(f"{p}{name}.weight" for name in names)), bias)

    def norm_if(has: bool, name: str) -> Tensor | None:  # noqa: FBT001  (reads as a sentence)
        return weights.norm(f"{p}{name}.weight") if has else None

    return _Layer(
        is_sliding=index in config.sliding_layers,
        input_norm=weights.norm(f"{p}input_layernorm.weight"),
        qkv=linear(*(f"self_attn.{name}_proj" for name in "qkv"), has_bias=has_qkv_bias),
        q_norm=norm_if(family.has_head_norms, "self_attn.q_norm"),
        k_norm=norm_if(family.has_head_norms, "self_attn.k_norm"),
        o=linear("self_attn.o_proj", has_bias=config.has_attention_bias),
        attention_norm=norm_if(family.has_output_norms, "post_attention_layernorm"),
        mlp_input_norm=weights.norm(f"{p}{mlp_input_norm}.weight"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
        mlp_norm=norm_if(family.has_output_norms, "post_feedforward_layernorm"),
    )
