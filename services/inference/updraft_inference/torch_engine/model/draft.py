"""The forward of a draft network as it serves: flat rows of many sequences, joined projections, weights as kernels read them.

The network (`updraft_draft.network`) stays the source of truth: swaps write its tensors, and the digest covers them. The joined
and packed weights are a copy, made outside the engine's thread, so that a swap pauses only to exchange a reference. Where the
CPU multiplies in int8, the copy is rounded to it, and a step is two calls of the C++ kernels: what a draft proposes changes the
speed of an answer, never its text.

Tensors: R rows, A auxiliary, D hidden, H heads, K key-value heads, E head size, V draft vocabulary.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from updraft_chassis.errors import Exhausted
from updraft_draft.network import DraftNetwork, Norm
from updraft_inference.torch_engine.model.kv_cache import Batch, SlotCache
from updraft_inference.torch_engine.model.linear import Int8Linear, Linear, linear
from updraft_inference.torch_engine.model.native_ops import is_narrow, operations
from updraft_inference.torch_engine.model.ops import AttentionContext, Heads, TopScores, joined
from updraft_kernels.loader import DraftStep, Kernels

_ATTENTION, _MLP = "midlayer.self_attn", "midlayer.mlp"


class PackedWeights(NamedTuple):
    """Weights of all projections."""

    fc: Linear
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    head: Linear


_NAMES = (
    ("fc",),
    (f"{_ATTENTION}.q_proj", f"{_ATTENTION}.k_proj", f"{_ATTENTION}.v_proj"),
    (f"{_ATTENTION}.o_proj",),
    (f"{_MLP}.gate_proj", f"{_MLP}.up_proj"),
    (f"{_MLP}.down_proj",),
    ("lm_head",),
)
"""The tensors that each field of `PackedWeights` joins, in the order of the fields."""


def pack(tensors: Mapping[str, Tensor], *, like: Tensor, library: Kernels | None) -> PackedWeights:
    """Copies of a checkpoint's weights, rounded to 8 bits where that is faster, and else in dtype and on the device of `like`.
    Exhausted if there is no memory for them."""
    try:
        return PackedWeights(*(linear(w.to(like), library=library, may_round=True) for w in _weights(tensors)))
    except RuntimeError as error:  # torch raises it when there is no memory
        raise Exhausted(f"there is no memory for a copy of the draft's weights: {error}") from error


def _weights(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [torch.cat([tensors[f"{name}.weight"] for name in names]) for names in _NAMES]


class PackedDraft:
    """Serves one network. Not thread-safe: the engine thread owns it."""

    def __init__(self, network: DraftNetwork, library: Kernels | None = None) -> None:
        c = network.config
        self._network, self._library = network, library
        self._operations = operations(library, like=network.embedding, head_dim=c.head_dim)
        self.exchange(pack(network.state_dict(), like=network.lm_head.weight, library=library))
        self._heads = Heads(num=c.num_heads, num_kv=c.num_kv_heads, size=c.head_dim, scale=c.head_dim**-0.5)

    @property
    def pads(self) -> bool:
        return self._operations.pads

    def exchange(self, weights: PackedWeights) -> None:
        """Serve these weights, which the network holds by now."""
        self._weights = weights
        self._native: NativeStep | None = None
        if self._library is not None and self._library.has_int8 and not self._operations.pads:
            self._native = NativeStep.of(self._network, weights, self._library)

    def is_current(self) -> bool:
        """Whether the weights that serve are made of those of the network, value by value."""
        weights = _weights(self._network.state_dict())
        return all(served.holds(weight) for served, weight in zip(self._weights, weights, strict=True))

    def fuse(self, aux_RA: Tensor) -> Tensor:
        """The draft's first input [R, D], from the target's auxiliary states."""
        return self._weights.fc(aux_RA)

    def forward(self, x_RD: Tensor, ids_R: Tensor, batches: Sequence[Batch], cache: SlotCache) -> Tensor:
        """The states [R, D] for the next draft step, from states and the tokens after them. Writes keys and values to the only
        layer of `cache`."""
        if self._native is not None and len(batches) == 1 and is_narrow(batches[0]):
            return self._native.forward(x_RD, ids_R, batches[0], cache)
        c, layer, ops = self._network.config, self._network.midlayer, self._operations
        cos, sin = (
            table.squeeze(-2) for table in self._network.rotary(joined([batch.positions_R for batch in batches]))
        )
        _, of_tokens = self._normed(F.embedding(ids_R, self._network.embedding), None, layer.input_layernorm)
        _, of_states = self._normed(x_RD, None, layer.hidden_norm)
        qkv = self._weights.qkv(torch.cat([of_tokens, of_states], -1))
        attended = ops.attend(qkv, self._heads, AttentionContext(batches=batches, cos=cos, sin=sin), cache, 0)
        residual = of_states if c.norm_before_residual else x_RD
        y, normed = self._normed(residual, self._weights.o(attended), layer.post_attention_layernorm)
        return y + self._weights.down(ops.gate(self._weights.gate_up(normed)))

    def _normed(self, x: Tensor, y: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        return self._operations.add_norm(x, y, norm.weight, norm.eps)

    def head(self, y_RD: Tensor) -> tuple[Tensor, TopScores]:
        """Logits over the draft vocabulary, [R, V], and the likeliest token of each row."""
        if self._native is not None:
            return self._native.head(y_RD)
        logits_RV = self._weights.head(self._normed(y_RD, None, self._network.norm)[1])
        return logits_RV, self._operations.top_scores(logits_RV, [True] * len(logits_RV))


class NativeStep:
    """The same by two calls of the C++ kernels, for weights in int8 and states in bfloat16."""

    def __init__(self, step: DraftStep, library: Kernels, *, keeps: Sequence[object], num_positions: int) -> None:
        """`keeps`: the owners of the memory in `step`."""
        self._step, self._library, self._keeps = step, library, keeps
        self._num_positions = num_positions

    @classmethod
    def of(cls, network: DraftNetwork, weights: PackedWeights, library: Kernels) -> Self | None:
        """None if a weight is not in int8."""
        parts = [part.packed for part in weights[1:] if isinstance(part, Int8Linear)]
        if len(parts) < len(weights[1:]):
            return None
        c, layer = network.config, network.midlayer
        norms = (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm, network.norm)
        tensors = (network.embedding, *(norm.weight for norm in norms), *network.rotary_tables)
        assert all(tensor.dtype == torch.bfloat16 and tensor.is_contiguous() for tensor in tensors)
        step = DraftStep(
            *parts,
            *(tensor.data_ptr() for tensor in tensors),
            hidden=c.hidden_size,
            intermediate=c.intermediate_size,
            heads=c.num_heads,
            kv_heads=c.num_kv_heads,
            head_size=c.head_dim,
            norms_residual=c.norm_before_residual,
            eps=c.rms_norm_eps,
        )
        return cls(step, library, keeps=(weights, tensors), num_positions=len(tensors[-1]))

    def forward(self, x_RD: Tensor, ids_R: Tensor, batch: Batch, cache: SlotCache) -> Tensor:
        """As `PackedDraft.forward`."""
        keys, values = cache.of_layer(0)
        x_RD = x_RD.contiguous()
        y_RD = torch.empty_like(x_RD)
        assert x_RD.dtype == keys.dtype == torch.bfloat16
        assert batch.span <= self._num_positions
        self._step.keys, self._step.values, self._step.positions = (
            keys.data_ptr(),
            values.data_ptr(),
            cache.num_positions,
        )
        has_memory = self._library.draft_step(
            ctypes.byref(self._step),
            x_RD.data_ptr(),
            ids_R.data_ptr(),
            batch.plan_3B.data_ptr(),
            len(batch.slots),
            len(x_RD),
            y_RD.data_ptr(),
        )
        if not has_memory:
            raise RuntimeError("no memory for a draft step")  # the type that torch raises
        return y_RD

    def head(self, y_RD: Tensor) -> tuple[Tensor, TopScores]:
        """As `PackedDraft.head`; logits are float32."""
        rows, y_RD = len(y_RD), y_RD.contiguous()
        logits_RV = torch.empty(rows, self._step.head.num_outputs)
        best_R, log_sum_R = torch.empty(2, rows)
        choice_R = torch.empty(rows, dtype=torch.long)
        has_memory = self._library.draft_head(
            ctypes.byref(self._step),
            y_RD.data_ptr(),
            rows,
            *(out.data_ptr() for out in (logits_RV, best_R, choice_R, log_sum_R)),
        )
        if not has_memory:
            raise RuntimeError("no memory for a draft's logits")
        return logits_RV, TopScores(best_R, choice_R, log_sum_R)
