"""The forward of a draft network as it serves: flat rows of many sequences, projections joined, weights as kernels read them.

The network (`updraft_draft.network`) stays the truth: swaps write its tensors, and the proof hashes them. What is joined or
packed here is a copy of them, made beside the engine's thread, so that a pause exchanges a reference.

Tensors: R rows, A auxiliary, D hidden, H heads, K key-value heads, E head size, V draft vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from updraft_chassis.errors import Exhausted
from updraft_draft.layers import rotate
from updraft_draft.network import DraftNetwork, Rows
from updraft_inference.torch_engine.linear import Linear

_ATTENTION, _MLP = "midlayer.self_attn", "midlayer.mlp"


class Packed(NamedTuple):
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
"""What each field of `Packed` is joined of, in their order."""


def pack(tensors: Mapping[str, Tensor], *, like: Tensor) -> Packed:
    """Copies of a checkpoint's weights, in dtype and on the device of `like`. Exhausted where there is no memory for them."""
    try:
        return Packed(*(Linear(weight.to(like)) for weight in _weights(tensors)))
    except RuntimeError as error:  # torch's word for it
        raise Exhausted(f"there is no memory for a copy of the draft's weights: {error}") from error


def _weights(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [torch.cat([tensors[f"{name}.weight"] for name in names]) for names in _NAMES]


class ServedDraft:
    """Of one network. Not thread-safe: the engine thread owns it."""

    def __init__(self, network: DraftNetwork) -> None:
        self._network = network
        self._weights = pack(network.state_dict(), like=network.lm_head.weight)

    def exchange(self, weights: Packed) -> None:
        """Serve these from now on: those that the network was given."""
        self._weights = weights

    def is_current(self) -> bool:
        """What serves is what the network holds, value by value."""
        return all(map(torch.equal, (each.weight for each in self._weights), _weights(self._network.state_dict())))

    def fuse(self, aux_RA: Tensor) -> Tensor:
        """The target's auxiliary states as the draft's first input, [R, D]."""
        return self._weights.fc(aux_RA)

    def rows(self, x_RD: Tensor, ids_R: Tensor, positions_R: Tensor) -> Rows:
        """Project states and the tokens after them: q [R, H, E], k and v [R, K, E]; queries and keys are rotated."""
        c, layer = self._network.config, self._network.midlayer
        embedded = F.embedding(ids_R, self._network.embedding)
        both = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(x_RD)], -1)
        of_keys = c.num_kv_heads * c.head_dim
        q, k, v = torch.split(self._weights.qkv(both), [c.num_heads * c.head_dim, of_keys, of_keys], -1)
        cos, sin = self._network.rotary(positions_R)
        return Rows(
            rotate(q.view(-1, c.num_heads, c.head_dim), cos, sin),
            rotate(k.view(-1, c.num_kv_heads, c.head_dim), cos, sin),
            v.view(-1, c.num_kv_heads, c.head_dim),
        )

    def finish(self, x_RD: Tensor, attended: Tensor) -> Tensor:
        """Residuals and MLP after attention [R, H * E]: the state that the next draft step reads, [R, D]."""
        layer = self._network.midlayer
        if self._network.config.norm_before_residual:
            x_RD = layer.hidden_norm(x_RD)
        y = x_RD + self._weights.o(attended)
        gate, up = self._weights.gate_up(layer.post_attention_layernorm(y)).chunk(2, -1)
        return y + self._weights.down(F.silu(gate) * up)

    def logits(self, y_RD: Tensor) -> Tensor:
        """Logits over the draft vocabulary, [R, V]."""
        return self._weights.head(self._network.norm(y_RD))
