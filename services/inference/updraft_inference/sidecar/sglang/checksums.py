"""The checksums that SGLang's weights_checker must report for a draft, computed from its checkpoint.

They cover every parameter of the draft, after SGLang has fused q, k, v and gate, up, in the dtype that it serves in. On
a CPU a checksum is the beginning of a SHA-256; on a GPU it is SGLang's own `gpu_tensor_hash`, reimplemented here in
numpy. They also cover the map from draft to target tokens where the plugin made it a buffer. Each rank of a tensor-parallel
group has its own part of each tensor, and the whole map.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from updraft_draft import checkpoint
from updraft_draft.config import DraftConfig
from updraft_inference.sidecar.sglang.server import DRAFT, RankChecksums
from updraft_tap.weights import EMBEDDING

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "float": torch.float32,
}
_PADDING = 64
"""SGLang pads the rows of a head to a multiple of this, with zeros."""

_LAYER = "model.layers.0"

VOCABULARY = f"{DRAFT}.hot_token_id"
"""The server's name for the target's token of each draft token."""


def candidate_dtypes(dtype: str) -> tuple[torch.dtype, ...]:
    """Dtypes in which a server may hold its draft, likeliest first; "auto" usually means that of the file."""
    return (_DTYPES[dtype],) if dtype in _DTYPES else (torch.bfloat16, torch.float16, torch.float32)


def expected_hashes(
    config: DraftConfig, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, device: str, tp: tuple[int, int]
) -> dict[str, str]:
    """Hashes by the server's names of a checkpoint's tensors, for rank `tp[0]` of `tp[1]`; `device` is "cpu" or another."""
    compute_hash = _cpu_hash if device == "cpu" else gpu_hash
    weights = {name: tensor.to(dtype) for name, tensor in tensors.items() if name not in checkpoint.VOCABULARY}
    parts = {f"{DRAFT}.{name}": tensor for name, tensor in served_tensors(config, weights, tp=tp).items()}
    parts[VOCABULARY] = tensors["d2t"] + torch.arange(config.draft_vocab_size)
    return {name: f"{compute_hash(tensor):016x}" for name, tensor in parts.items()}


def shows_vocabulary(served: Iterable[RankChecksums]) -> bool:
    """Whether the server's checksums cover its map, so that they can prove a swap."""
    return all(VOCABULARY in rank.hashes for rank in served)


def differing(expected: Mapping[str, str], served: RankChecksums) -> list[str]:
    """Names of tensors that differ. The server's other tensors (the target's embedding) are ignored."""
    return sorted(name for name, hashed in expected.items() if served.hashes.get(name) != hashed)


def served_tensors(config: DraftConfig, tensors: Mapping[str, Tensor], *, tp: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of a checkpoint as one rank of SGLang's LlamaForCausalLMEagle3 holds them."""
    rank, size = tp

    def rows(name: str) -> Tensor:
        return tensors[f"midlayer.{name}.weight"].chunk(size, 0)[rank]

    def columns(name: str) -> Tensor:
        return tensors[f"midlayer.{name}.weight"].chunk(size, 1)[rank]

    def heads(name: str) -> Tensor:
        """Key-value heads; several ranks share one if there are fewer heads than ranks."""
        whole = tensors[f"midlayer.{name}.weight"]
        return whole.chunk(min(size, config.num_kv_heads), 0)[rank * min(size, config.num_kv_heads) // size]

    joined = {
        "self_attn.qkv_proj": (rows("self_attn.q_proj"), heads("self_attn.k_proj"), heads("self_attn.v_proj")),
        "mlp.gate_up_proj": (rows("mlp.gate_proj"), rows("mlp.up_proj")),
        "self_attn.o_proj": (columns("self_attn.o_proj"),),
        "mlp.down_proj": (columns("mlp.down_proj"),),
        **{norm: (tensors[f"midlayer.{norm}.weight"],) for norm in ("hidden_norm", "input_layernorm")},
        "post_attention_layernorm": (tensors["midlayer.post_attention_layernorm.weight"],),
    }
    return {
        "model.fc.weight": tensors["fc.weight"],
        "model.norm.weight": tensors["norm.weight"],
        "lm_head.weight": _padded(tensors["lm_head.weight"]).chunk(size, 0)[rank],
        **{f"{_LAYER}.{name}.weight": torch.cat(parts) for name, parts in joined.items()},
    }


def _padded(head: Tensor) -> Tensor:
    return torch.cat([head, head.new_zeros(-len(head) % _PADDING, head.shape[1])])


def summary(served: Iterable[RankChecksums]) -> str:
    """One digest of all served weights, for weights that match no known draft."""
    digest = hashlib.sha256()
    for rank in served:
        for name, hashed in sorted(rank.hashes.items()):
            digest.update(f"{rank.tp_rank}\0{name}\0{hashed}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def target(served: Iterable[RankChecksums]) -> str:
    """One digest of the weights that the draft shares with the target."""
    return summary(
        replace(rank, hashes={name: hashed for name, hashed in rank.hashes.items() if name.endswith(EMBEDDING)})
        for rank in served
    )


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _cpu_hash(tensor: Tensor) -> int:
    return int.from_bytes(hashlib.sha256(_bytes(tensor).data).digest()[:8])


_SEEDS = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
_POSITION = ((0x27D4EB2D, 15), (0x165667B1, 13))
"""How the index of a word is mixed into each half of the hash: a factor and a rotation."""
_TILE = 8192
_TILES_AT_ONCE = 32
"""Keeps the working set within a core's cache."""

_Words = NDArray[np.uint32]


def gpu_hash(tensor: Tensor) -> int:
    """`sglang.kernels.ops.memory.gpu_tensor_hash` of a tensor: each word is mixed with its index, then summed by tiles."""
    data = _bytes(tensor)
    words = (
        np.concatenate([data, np.zeros(-len(data) % 4, np.uint8)]).view(np.uint32)
        if len(data) % 4
        else data.view(np.uint32)
    )
    if not len(words):
        return 0
    length = np.uint32(4 * len(words) & 0xFFFFFFFF)
    total = 0
    for start in range(0, len(words), _TILE * _TILES_AT_ONCE):
        block = words[start : start + _TILE * _TILES_AT_ONCE]
        high, low = (_mixed(_tile_sums(block, start, half) ^ length).astype(np.uint64) for half in (0, 1))
        total += int(((high << np.uint64(32)) | low).sum(dtype=np.uint64))
    return _finished(total)


def _tile_sums(block: _Words, start: int, half: int) -> _Words:
    """A sum for each tile of words, mixed with their indices, which begin at `start`. Sums wrap."""
    factor, turn = _POSITION[half]
    index = np.arange(start, start + len(block), dtype=np.uint32)
    place = index * np.uint32(factor) + np.uint32(_SEEDS[half])
    place ^= (index << np.uint32(turn)) | (index >> np.uint32(32 - turn))
    mixed = _mixed(place ^ block)
    return np.add.reduceat(mixed, np.arange(0, len(block), _TILE), dtype=np.uint32)


def _mixed(x: _Words) -> _Words:
    x = x ^ (x >> np.uint32(16))
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x


def _finished(x: int) -> int:
    mask = 2**64 - 1
    x &= mask
    x ^= x >> 30
    x = (x * 0xBF58476D1CE4E5B9) & mask
    x ^= x >> 27
    x = (x * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
