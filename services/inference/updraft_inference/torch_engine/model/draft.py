"""The forward of a draft network as it serves: flat rows of many sequences, joined projections, weights as kernels read them.

The network (`updraft_draft.network`) stays the source of truth: swaps write its tensors, and the digest covers them. The joined
and packed weights are a copy, made outside the engine's thread, so that a swap pauses only to exchange a reference.

Tensors: R rows, A auxiliary, D hidden, H heads, K key-value heads, E head size, V draft vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from updraft_chassis.errors import Exhausted
from updraft_draft.network import DraftNetwork, Norm
from updraft_inference.torch_engine.model.kv_cache import Batch, SlotCache
from updraft_inference.torch_engine.model.linear import Linear, linear
from updraft_inference.torch_engine.model.native_ops import operations
from updraft_inference.torch_engine.model.ops import AttentionContext, Heads, joined
from updraft_kernels.loader import Kernels

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
    """Copies of a checkpoint's weights, in dtype and on the device of `like`. Exhausted if there is no memory for them."""
    try:
        return PackedWeights(*(linear(weight.to(like), library=library) for weight in _weights(tensors)))
    except RuntimeError as error:  # torch raises it when there is no memory
        raise Exhausted(f"there is no memory for a copy of the draft's weights: {error}") from error


def _weights(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [torch.cat([tensors[f"{name}.weight"] for name in names]) for names in _NAMES]


class PackedDraft:
    """Serves one network. Not thread-safe: the engine thread owns it."""

    def __init__(self, network: DraftNetwork, library: Kernels | None = None) -> None:
        c = network.config
        self._network = network
        self._weights = pack(network.state_dict(), like=network.lm_head.weight, library=library)
        self._operations = operations(library, like=network.embedding, head_dim=c.head_dim)
        self._heads = Heads(num=c.num_heads, num_kv=c.num_kv_heads, size=c.head_dim, scale=c.head_dim**-0.5)

    @property
    def pads(self) -> bool:
        return self._operations.pads

    def exchange(self, weights: PackedWeights) -> None:
        """Serve these weights, which the network holds by now."""
        self._weights = weights

    def is_current(self) -> bool:
        """Whether the weights that serve equal those of the network, value by value."""
        return all(map(torch.equal, (linear.weight for linear in self._weights), _weights(self._network.state_dict())))

    def fuse(self, aux_RA: Tensor) -> Tensor:
        """The draft's first input [R, D], from the target's auxiliary states."""
        return self._weights.fc(aux_RA)

    def forward(self, x_RD: Tensor, ids_R: Tensor, batches: Sequence[Batch], cache: SlotCache) -> Tensor:
        """The states [R, D] for the next draft step, from states and the tokens after them. Writes keys and values to the only
        layer of `cache`."""
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

    def logits(self, y_RD: Tensor) -> Tensor:
        """Logits over the draft vocabulary, [R, V]."""
        return self._weights.head(self._normed(y_RD, None, self._network.norm)[1])
