"""Run by SGLang's Python with TRITON_INTERPRET=1: its own kernel's hash of some bytes, without a GPU. Prints JSON."""

import json
import sys
from typing import Any

import torch
from sglang.kernels.ops.memory import gpu_tensor_hash as kernel

_TILE, _BLOCK, _CHUNK = 8192, 256, 1024
_SEED = 0x243F6A88


def hashed(values: torch.Tensor) -> int:
    """As `gpu_tensor_hash`, whose first line asks for a GPU."""
    padded = torch.cat([values, torch.zeros(-len(values) % 4, dtype=torch.uint8)])
    words = padded.view(torch.uint32)
    parts = torch.empty(-(-len(words) // _TILE), dtype=torch.uint64)
    constants: dict[str, Any] = {
        "FM_C1": kernel.FMIX32_C1,
        "FM_C2": kernel.FMIX32_C2,
        "POS_A": kernel.POS_C1,
        "POS_B": kernel.POS_C2,
        "TILE": _TILE,
        "BLOCK": _BLOCK,
        "USE_CG": False,
    }
    second = ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF
    kernel.hash_tiles32_kernel_blocked[(len(parts),)](words, parts, len(words), seed1=_SEED, seed2=second, **constants)
    while len(parts) > 1:
        fewer = torch.empty(-(-len(parts) // _CHUNK), dtype=torch.uint64)
        kernel.add_tree_reduce_u64_kernel[(len(fewer),)](parts, fewer, len(parts), CHUNK=_CHUNK)
        parts = fewer
    found: int = kernel._final_splitmix64(int(parts.item()))
    return found


def numbers(count: int) -> torch.Tensor:
    """As in test_gpu_hash.py."""
    return ((torch.arange(count, dtype=torch.int64) * 2654435761) % 251).to(torch.uint8)


if __name__ == "__main__":
    sys.stdout.write(json.dumps({size: f"{hashed(numbers(int(size))):016x}" for size in sys.argv[1:]}) + "\n")
