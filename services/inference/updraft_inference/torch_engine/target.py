"""A target over a slot KV cache: one forward for any mix of sequences and of new tokens of each.

The forward is Llama's. Where another family does more, its layers hold a tensor that Llama's do not, so that nobody pays for
what only others need. A sliding window is a mask over the whole cache: exact, and no smaller cache.

Every forward also yields what learning needs: the auxiliary states and the last hidden state of each row.

Tensors: R new rows of all sequences, D hidden, H heads, K key-value heads, E head size, A auxiliary, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from updraft_chassis.errors import InvalidInput
from updraft_chassis.rope import Rope
from updraft_draft.config import Family, TargetConfig
from updraft_draft.layers import grouped_attention, rms_norm, rotary_table, rotate
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
    """Where new tokens are and what they see, for one kind of layer: rotation [R, 1, E] and of each batch the additive mask
    [B, T, S]."""

    cos: Tensor
    sin: Tensor
    masks: list[Tensor | None]


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
        """`num_positions`: as many will be used, which may be some more than the model knows, for drafts beyond a request's
        end are not kept; None: as many as it knows, which may be a million."""
        weights = _Weights(tensors, config.family, dtype, device)
        of_tokens = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = weights.joined({EMBEDDING: of_tokens})
        self._head = Linear(self.embedding if config.is_tied else weights.joined({HEAD: of_tokens}))
        self._final_norm = weights.norm(FINAL_NORM, config.hidden_size)
        self._layers = [_layer(weights, config, i) for i in range(config.num_layers)]
        self._activation = _ACTIVATIONS[config.activation]
        self._embedding_scale = self.embedding.new_tensor(config.hidden_size**0.5)
        ropes = {False: config.rope, True: config.sliding_rope}
        tables = {rope: self._table(num_positions or config.max_position, rope) for rope in set(ropes.values())}
        self._tables = {layer.is_sliding: tables[ropes[layer.is_sliding]] for layer in self._layers}
        """Cosines and sines by `is_sliding`, for the kinds of layers that there are."""

    def _table(self, num_positions: int, rope: Rope) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_table(num_positions, self.config.head_dim, rope)
        return cos.to(self.embedding), sin.to(self.embedding)

    @classmethod
    def open(cls, folder: Path, *, dtype: torch.dtype, device: torch.device, num_positions: int | None = None) -> Self:
        """Read a Hugging Face folder. InvalidInput if it is none, or of no family that runs here, Corrupt if it is damaged."""
        config, tensors = TargetConfig.from_folder(folder), read_tensors(folder)
        try:
            return cls(config, tensors, dtype=dtype, device=device, num_positions=num_positions)
        except KeyError as error:
            raise InvalidInput(f"{folder} lacks the tensor {error}") from None
        except InvalidInput as error:
            raise InvalidInput(f"the model in {folder} cannot be served: {error}") from None

    @torch.inference_mode()
    def forward(self, ids_R: Tensor, batches: Sequence[Batch], cache: SlotCache) -> Forward:
        """Run the new tokens `ids_R` of all batches, one after the other, writing their keys and values into `cache`."""
        c, sizes = self.config, [len(batch.rows_R) for batch in batches]
        rows_R, positions_R = _joined([b.rows_R for b in batches]), _joined([b.positions_R for b in batches])
        x = F.embedding(ids_R, self.embedding)
        if c.family.is_embedding_scaled:
            x = x * self._embedding_scale
        sights = {is_sliding: self._sight(positions_R, batches, is_sliding=is_sliding) for is_sliding in self._tables}
        aux: list[Tensor] = []
        split = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
        for i, layer in enumerate(self._layers):
            if i in c.aux_layers:
                aux.append(x)
            cos, sin, masks = sights[layer.is_sliding]
            q, k, v = torch.split(layer.qkv(rms_norm(x, layer.input_norm, c.rms_norm_eps)), split, -1)
            q, k = q.view(-1, c.num_heads, c.head_dim), k.view(-1, c.num_kv_heads, c.head_dim)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = rms_norm(q, layer.q_norm, c.rms_norm_eps), rms_norm(k, layer.k_norm, c.rms_norm_eps)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            cache.write(i, rows_R, k, v.view(-1, c.num_kv_heads, c.head_dim))
            attended = [
                batch.collect(
                    grouped_attention(batch.spread(own), *cache.read(i, batch), mask, scale=c.attention_scale)
                )
                for batch, own, mask in zip(batches, torch.split(q, sizes), masks, strict=True)
            ]
            x = self._add(x, layer.o(_joined(attended)), layer.attention_norm)
            gate, up = layer.gate_up(rms_norm(x, layer.mlp_input_norm, c.rms_norm_eps)).chunk(2, -1)
            x = self._add(x, layer.down(self._activation(gate) * up), layer.mlp_norm)
        return Forward(torch.cat(aux, -1), rms_norm(x, self._final_norm, c.rms_norm_eps))

    def _add(self, x: Tensor, y: Tensor, norm: Tensor | None) -> Tensor:
        return x + (y if norm is None else rms_norm(y, norm, self.config.rms_norm_eps))

    def _sight(self, positions_R: Tensor, batches: Sequence[Batch], *, is_sliding: bool) -> _Sight:
        cos, sin = self._tables[is_sliding]
        masks = [self._sliding(batch) if is_sliding else batch.mask_BTS for batch in batches]
        return _Sight(cos[positions_R].unsqueeze(1), sin[positions_R].unsqueeze(1), masks)

    def _sliding(self, batch: Batch) -> Tensor | None:
        """A batch's mask where layers see no further than the window."""
        mask = batch.mask_BTS
        if batch.span <= self.config.window:  # everything is within reach
            return mask
        key_positions = torch.arange(batch.span, device=batch.positions_R.device)
        lost = key_positions <= (batch.spread(batch.positions_R) - self.config.window)[..., None]
        mask = self.embedding.new_zeros(lost.shape) if mask is None else mask
        return mask.masked_fill(lost, float("-inf"))

    @torch.inference_mode()
    def logits(self, last: Tensor) -> Tensor:
        """Logits [..., V] of last hidden states [..., D]."""
        return self._head(last)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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

    def joined(self, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
        found = [self._checked(name, shape).to(self.device, self.dtype) for name, shape in shapes.items()]
        return torch.cat(found)

    def norm(self, name: str, size: int) -> Tensor:
        return norm_weight(self._checked(name, (size,)), self.family).to(self.device, self.dtype, copy=True)

    def _checked(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            raise InvalidInput(f"{name} has shape {list(tensor.shape)}, its config.json says {list(shape)}")
        if not tensor.is_floating_point():
            raise InvalidInput(f"{name} is {tensor.dtype}, and quantised weights are not supported")
        return tensor


def _layer(weights: _Weights, config: TargetConfig, index: int) -> _Layer:
    c, family, p = config, config.family, f"model.layers.{index}."
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    has_qkv_bias = family.has_qkv_bias or config.has_attention_bias
    # Llama names the norm before its MLP after what comes before it; where that has a norm of its own, the name is taken.
    mlp_input_norm = "pre_feedforward_layernorm" if family.has_output_norms else "post_attention_layernorm"

    def linear(num_columns: int, num_rows: Mapping[str, int], *, has_bias: bool = False) -> Linear:
        bias = weights.joined({f"{p}{name}.bias": (num,) for name, num in num_rows.items()}) if has_bias else None
        return Linear(weights.joined({f"{p}{name}.weight": (num, num_columns) for name, num in num_rows.items()}), bias)

    def norm(name: str, size: int = c.hidden_size) -> Tensor:
        return weights.norm(f"{p}{name}.weight", size)

    return _Layer(
        is_sliding=index in config.sliding_layers,
        input_norm=norm("input_layernorm"),
        qkv=linear(
            c.hidden_size,
            {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads, "self_attn.v_proj": kv_heads},
            has_bias=has_qkv_bias,
        ),
        q_norm=norm("self_attn.q_norm", c.head_dim) if family.has_head_norms else None,
        k_norm=norm("self_attn.k_norm", c.head_dim) if family.has_head_norms else None,
        o=linear(heads, {"self_attn.o_proj": c.hidden_size}, has_bias=c.has_attention_bias),
        attention_norm=norm("post_attention_layernorm") if family.has_output_norms else None,
        mlp_input_norm=norm(mlp_input_norm),
        gate_up=linear(c.hidden_size, {"mlp.gate_proj": c.intermediate_size, "mlp.up_proj": c.intermediate_size}),
        down=linear(c.intermediate_size, {"mlp.down_proj": c.hidden_size}),
        mlp_norm=norm("post_feedforward_layernorm") if family.has_output_norms else None,
    )
