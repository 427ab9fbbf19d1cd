"""The target over a slot KV cache: one forward for any mix of sequences and numbers of new tokens.

The forward is Llama's. Layers of other architectures hold tensors that Llama's do not, so none pays for what only others need.
A sliding window is a mask over the whole cache, which is exact and saves no memory.

Every forward also returns the rows that training needs: the auxiliary states and the last hidden state of each row.

Tensors: R new rows of all sequences, D hidden, H heads, K key-value heads, E head size, A auxiliary, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from updraft_artifacts.rope import Rope
from updraft_chassis.errors import InvalidInput
from updraft_draft.layers import rotary_table
from updraft_draft.target_weights import norm_weight, read_tensors
from updraft_inference.torch_engine.model.config import TargetConfig
from updraft_inference.torch_engine.model.kv_cache import Batch, SlotCache
from updraft_inference.torch_engine.model.linear import Linear, linear
from updraft_inference.torch_engine.model.native_ops import NativeOps, operations
from updraft_inference.torch_engine.model.ops import AttentionContext, Heads, joined
from updraft_kernels.loader import Kernels

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


class ForwardOutput(NamedTuple):
    """aux [R, A] (auxiliary states, concatenated) and last [R, D] (after the final norm)."""

    aux: Tensor
    last: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Weights of one decoder layer, with projections of the same input joined. None: the architecture has no such weight."""

    is_sliding: bool
    input_norm: Tensor
    qkv: Linear
    heads: Heads
    o: Linear
    attention_norm: Tensor | None
    """Norm of the output of attention."""
    mlp_input_norm: Tensor
    gate_up: Linear
    down: Linear
    mlp_norm: Tensor | None
    """Norm of the output of the MLP."""


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
        library: Kernels | None = None,
    ) -> None:
        """`num_positions`: positions in use. It may exceed the model's by a few, because drafts beyond a request's end are
        never accepted. None: the model's own number, which may be a million."""
        weights = _Weights(tensors, config.norm_offset, dtype, device, library)
        of_tokens = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = weights.joined({EMBEDDING: of_tokens})
        self._head = weights.linear(self.embedding if config.is_tied else weights.joined({HEAD: of_tokens}))
        self._final_norm = weights.norm(FINAL_NORM, config.hidden_size)
        self._layers = [_layer(weights, config, i) for i in range(config.num_layers)]
        self.library = library
        self.operations = operations(library, like=self.embedding, head_dim=config.head_dim)
        self._gate = self.operations.gate if config.activation == "silu" else _gelu_gate
        self._embedding_scale = self.embedding.new_tensor(config.hidden_size**0.5)
        ropes = {False: config.rope, True: config.sliding_rope}
        tables = {rope: self._table(num_positions or config.max_position, rope) for rope in set(ropes.values())}
        self._tables = {layer.is_sliding: tables[ropes[layer.is_sliding]] for layer in self._layers}
        """Cosines and sines by `is_sliding`, for the kinds of layers that the model has."""

    @property
    def kernels(self) -> str:
        """The variant of the C++ kernels that it computes with; "torch" if with torch's operations."""
        return self.library.variant if self.library is not None and isinstance(self.operations, NativeOps) else "torch"

    def _table(self, num_positions: int, rope: Rope) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_table(num_positions, self.config.head_dim, rope)
        return cos.to(self.embedding), sin.to(self.embedding)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_positions: int | None = None,
        library: Kernels | None = None,
    ) -> Self:
        """Read a Hugging Face folder. InvalidInput for another one or another architecture, Corrupt for a damaged file."""
        config, tensors = TargetConfig.from_folder(folder), read_tensors(folder)
        try:
            return cls(config, tensors, dtype=dtype, device=device, num_positions=num_positions, library=library)
        except KeyError as error:
            raise InvalidInput(f"{folder} lacks the tensor {error}") from None
        except InvalidInput as error:
            raise InvalidInput(f"the model in {folder} cannot be served: {error}") from None

    @torch.inference_mode()
    def forward(self, ids_R: Tensor, batches: Sequence[Batch], cache: SlotCache) -> ForwardOutput:
        """Run the new tokens `ids_R` of all batches, in their order, and write keys and values to `cache`."""
        c, ops = self.config, self.operations
        eps = c.rms_norm_eps
        positions_R = joined([batch.positions_R for batch in batches])
        sights = {is_sliding: self._sight(positions_R, batches, is_sliding=is_sliding) for is_sliding in self._tables}
        x = F.embedding(ids_R, self.embedding)
        if c.architecture.is_embedding_scaled:
            x = x * self._embedding_scale
        y: Tensor | None = None
        aux: list[Tensor] = []
        for i, layer in enumerate(self._layers):
            x, normed = ops.add_norm(x, y, layer.input_norm, eps)
            if i in c.aux_layers:
                aux.append(x)
            attended = ops.attend(layer.qkv(normed), layer.heads, sights[layer.is_sliding], cache, i)
            y = self._normed(layer.o(attended), layer.attention_norm)
            x, normed = ops.add_norm(x, y, layer.mlp_input_norm, eps)
            y = self._normed(layer.down(self._gate(layer.gate_up(normed))), layer.mlp_norm)
        return ForwardOutput(torch.cat(aux, -1), ops.add_norm(x, y, self._final_norm, eps)[1])

    def _normed(self, y: Tensor, norm: Tensor | None) -> Tensor:
        return y if norm is None else self.operations.add_norm(y, None, norm, self.config.rms_norm_eps)[1]

    def _sight(self, positions_R: Tensor, batches: Sequence[Batch], *, is_sliding: bool) -> AttentionContext:
        cos, sin = self._tables[is_sliding]
        window = self.config.window if is_sliding else 0
        return AttentionContext(batches=batches, cos=cos[positions_R], sin=sin[positions_R], window=window)

    @torch.inference_mode()
    def logits(self, last: Tensor) -> Tensor:
        """Logits [..., V] of last hidden states [..., D]."""
        return self._head(last)


def _gelu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


@dataclass(frozen=True, slots=True)
class _Weights:
    """A model's weights as the engine needs them. They are copies, because `tensors` is a mapped file that is closed later."""

    tensors: Mapping[str, Tensor]
    norm_offset: float
    dtype: torch.dtype
    device: torch.device
    library: Kernels | None

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return linear(weight, bias, library=self.library)

    def joined(self, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
        return torch.cat([self._checked(name, shape).to(self.device, self.dtype) for name, shape in shapes.items()])

    def norm(self, name: str, size: int) -> Tensor:
        return norm_weight(self._checked(name, (size,)), self.norm_offset).to(self.device, self.dtype, copy=True)

    def _checked(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            raise InvalidInput(f"{name} has shape {list(tensor.shape)}, config.json requires {list(shape)}")
        if not tensor.is_floating_point():
            raise InvalidInput(f"{name} is {tensor.dtype}, and quantised weights are not supported")
        return tensor


def _layer(weights: _Weights, config: TargetConfig, index: int) -> _Layer:
    c, architecture, p = config, config.architecture, f"model.layers.{index}."
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    has_qkv_bias = architecture.has_qkv_bias or config.has_attention_bias
    # Llama names the norm before its MLP after attention. Where the attention output has a norm, that name is taken.
    mlp_input_norm = "pre_feedforward_layernorm" if architecture.has_output_norms else "post_attention_layernorm"

    def projection(num_columns: int, num_rows: Mapping[str, int], *, has_bias: bool = False) -> Linear:
        bias = weights.joined({f"{p}{name}.bias": (num,) for name, num in num_rows.items()}) if has_bias else None
        rows = {f"{p}{name}.weight": (num, num_columns) for name, num in num_rows.items()}
        return weights.linear(weights.joined(rows), bias)

    def norm(name: str, size: int = c.hidden_size) -> Tensor:
        return weights.norm(f"{p}{name}.weight", size)

    return _Layer(
        is_sliding=index in config.sliding_layers,
        input_norm=norm("input_layernorm"),
        qkv=projection(
            c.hidden_size,
            {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads, "self_attn.v_proj": kv_heads},
            has_bias=has_qkv_bias,
        ),
        heads=Heads(
            num=c.num_heads,
            num_kv=c.num_kv_heads,
            size=c.head_dim,
            scale=c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
            q_norm=norm("self_attn.q_norm", c.head_dim) if architecture.has_head_norms else None,
            k_norm=norm("self_attn.k_norm", c.head_dim) if architecture.has_head_norms else None,
            eps=c.rms_norm_eps,
        ),
        o=projection(heads, {"self_attn.o_proj": c.hidden_size}, has_bias=c.has_attention_bias),
        attention_norm=norm("post_attention_layernorm") if architecture.has_output_norms else None,
        mlp_input_norm=norm(mlp_input_norm),
        gate_up=projection(c.hidden_size, {"mlp.gate_proj": c.intermediate_size, "mlp.up_proj": c.intermediate_size}),
        down=projection(c.intermediate_size, {"mlp.down_proj": c.hidden_size}),
        mlp_norm=norm("post_feedforward_layernorm") if architecture.has_output_norms else None,
    )
