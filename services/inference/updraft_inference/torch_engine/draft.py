"""The forward of a draft network as it serves: flat rows of many sequences, projections joined, weights as kernels read them.

The network (`updraft_draft.network`) stays the truth: swaps write its tensors, and the proof hashes them. What is joined or
packed here is a copy of them, made anew by `refresh`.

Tensors: R rows, A auxiliary, D hidden, H heads, K key-value heads, E head size, V draft vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from updraft_draft.layers import rotate
from updraft_draft.network import DraftNetwork, Rows
from updraft_inference.torch_engine.linear import Linear


class _Weights(NamedTuple):
    fc: Linear
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    head: Linear


class ServedDraft:
    """Of one network. Not thread-safe: the engine thread owns it."""

    def __init__(self, network: DraftNetwork) -> None:
        self._network = network
        self._weights = _packed(network)

    def refresh(self) -> None:
        """Serve what the network holds now."""
        self._weights = _packed(self._network)

    def is_current(self) -> bool:
        """What serves is what the network holds, value by value."""
        served = (each.weight for each in self._weights)
        return all(map(torch.equal, served, (_weight(*maps) for maps in _maps(self._network))))

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


def _packed(network: DraftNetwork) -> _Weights:
    return _Weights(*(Linear(_weight(*maps)) for maps in _maps(network)))


def _maps(network: DraftNetwork) -> list[tuple[nn.Linear, ...]]:
    """What each of `_Weights` is made of, in their order."""
    attention, mlp = network.midlayer.self_attn, network.midlayer.mlp
    return [
        (network.fc,),
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
        (network.lm_head,),
    ]


def _weight(*maps: nn.Linear) -> Tensor:
    weights = [each.weight.detach() for each in maps]
    return weights[0] if len(weights) == 1 else torch.cat(weights)
