"""Sampling with a seed, such that the output is the seed's alone: no draft, lookahead or batch neighbour has a say in it.

Each position has noise of its own, which seed and position fix, and the token is the first to arrive in a race of
exponential clocks with rates p (the Gumbel-max rule): distributed as p, and the same one whether a draft guessed it or
not. A draft is kept where it is that token; one that is drawn by the same noise often is. Refused: speculative sampling
from a seeded generator, for how much randomness it uses depends on the drafts, and their number on the machine's speed.
"""

import hashlib
import struct

import torch
from torch import Tensor


def draw(p_V: Tensor, seed: int, position: int) -> int:
    """The output's token number `position`, distributed as p (float32, on the CPU)."""
    return first(p_V, exponential_noise(seed, position, len(p_V)))


def first(p: Tensor, times: Tensor) -> int:
    """The token that wins: both [V], the times are those of clocks with rate 1. RuntimeError for NaN."""
    speed, winner = (p / times).max(-1)
    if speed.isnan():
        raise RuntimeError("probability tensor contains nan")
    return int(winner)


def exponential_noise(seed: int, position: int, num: int) -> Tensor:
    """Exponential(1) variates, float32 [num]: those of a position are independent of all others."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed % 2**64, position), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    # Tensor.exponential_ takes four times as long. In float64, for what is next to 1 is what arrives first.
    return torch.rand(num, generator=generator, dtype=torch.float64).log_().neg_().float()
