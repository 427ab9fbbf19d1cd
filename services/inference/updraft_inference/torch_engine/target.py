"""A Llama-family target over a slot KV cache: one forward for any mix of sequences and of new tokens of each.

Every forward also yields what learning needs: the auxiliary states and the last hidden state of each row.

Tensors: R new rows of all sequences, D hidden, H heads, K key-value heads, E head size, A auxiliary, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from updraft_chassis.errors import InvalidInput
from updraft_draft.config import TargetConfig
from updraft_draft.layers import grouped_attention, rms_norm, rotary_table, rotate
from updraft_draft.target_weights import EMBEDDING, FINAL_NORM, HEAD, read_tensors
from updraft_inference.torch_engine.kv_cache import Batch, SlotCache


class Forward(NamedTuple):
    """aux [R, A] (auxiliary states, concatenated) and last [R, D] (after the final norm)."""

    aux: Tensor
    last: Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one decoder layer; projections that read the same input are joined."""

    input_norm: Tensor
    qkv: Tensor
    o: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Target:
    """The frozen model. Not thread-safe: one engine thread owns it."""

    def __init__(
        self, config: TargetConfig, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        def own(*names: str) -> Tensor:
            # A joined copy: `tensors` is a mapped file that is let go, and never in memory twice.
            return torch.cat([tensors[name].to(device, dtype) for name in names])

        self.config = config
        self.embedding = own(EMBEDDING)
        self.head = self.embedding if config.is_tied else own(HEAD)
        self._final_norm = own(FINAL_NORM)
        self._layers = [_layer(own, i) for i in range(config.num_layers)]
        cos, sin = rotary_table(config.max_position, config.head_dim, config.rope_theta)
        self._cos, self._sin = cos.to(self.embedding), sin.to(self.embedding)

    @classmethod
    def open(cls, folder: Path, *, dtype: torch.dtype, device: torch.device) -> Self:
        """Read a Hugging Face folder. InvalidInput if it is none, or not of the Llama family."""
        config = TargetConfig.from_folder(folder)
        try:
            return cls(config, read_tensors(folder), dtype=dtype, device=device)
        except KeyError as error:
            raise InvalidInput(f"{folder} lacks the tensor {error}") from None

    @torch.inference_mode()
    def forward(self, ids_R: Tensor, batch: Batch, cache: SlotCache) -> Forward:
        """Run the new tokens `ids_R` of `batch`, writing their keys and values into `cache`."""
        c = self.config
        x = F.embedding(ids_R, self.embedding)
        cos, sin = self._cos[batch.positions_R].unsqueeze(1), self._sin[batch.positions_R].unsqueeze(1)
        aux: list[Tensor] = []
        split = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
        for i, layer in enumerate(self._layers):
            if i in c.aux_layers:
                aux.append(x)
            q, k, v = torch.split(F.linear(rms_norm(x, layer.input_norm, c.rms_norm_eps), layer.qkv), split, -1)
            q = rotate(q.view(-1, c.num_heads, c.head_dim), cos, sin)
            k = rotate(k.view(-1, c.num_kv_heads, c.head_dim), cos, sin)
            keys, values = cache.write(i, batch, k, v.view(-1, c.num_kv_heads, c.head_dim))
            attended = grouped_attention(batch.spread(q), keys, values, batch.mask_BTS)
            x = x + F.linear(batch.collect(attended), layer.o)
            gate, up = F.linear(rms_norm(x, layer.post_norm, c.rms_norm_eps), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return Forward(torch.cat(aux, -1), rms_norm(x, self._final_norm, c.rms_norm_eps))

    @torch.inference_mode()
    def logits(self, last: Tensor) -> Tensor:
        """Logits [..., V] of last hidden states [..., D]."""
        return F.linear(last, self.head)


def _layer(own: Callable[..., Tensor], index: int) -> _Layer:
    p = f"model.layers.{index}."
    return _Layer(
        input_norm=own(f"{p}input_layernorm.weight"),
        qkv=own(*(f"{p}self_attn.{name}_proj.weight" for name in "qkv")),
        o=own(f"{p}self_attn.o_proj.weight"),
        post_norm=own(f"{p}post_attention_layernorm.weight"),
        gate_up=own(f"{p}mlp.gate_proj.weight", f"{p}mlp.up_proj.weight"),
        down=own(f"{p}mlp.down_proj.weight"),
    )
