"""Seeded sampling: the output depends on the seed alone, not on drafts, lookahead or other requests in the batch.

Seed and position determine the noise of each position. The token is the one with the largest p / noise (the Gumbel-max rule
with exponential noise). It is distributed as p, and it is the same whether or not a draft guessed it. A draft is accepted
where it is that token; drafts drawn by the same noise often are. Speculative sampling from a seeded generator was refused,
because how many random numbers it uses depends on the number of draft tokens, and that on the machine's speed.
"""

import hashlib
import struct

import torch
from torch import Tensor


def draw(p_V: Tensor, seed: int, position: int, known: dict[int, Tensor] | None = None) -> int:
    """The output's token number `position`, distributed as p (float32, on the CPU). Uses up the noise that is `known` there."""
    noise_V = known.pop(position, None) if known else None
    return first(p_V, exponential_noise(seed, position, len(p_V)) if noise_V is None else noise_V)


def first(p: Tensor, noise_V: Tensor) -> int:
    """The token with the largest p / noise, both float32 [V]. RuntimeError for NaN."""
    score, winner = (p / noise_V).max(-1)
    if score.isnan():
        raise RuntimeError("probability tensor contains nan")
    return int(winner)


def exponential_noise(seed: int, position: int, num: int) -> Tensor:
    """Exponential(1) variates, float32 [num], independent between positions."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed % 2**64, position), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    # Tensor.exponential_ takes four times as long. In float64, because the values closest to 1 decide.
    return torch.rand(num, generator=generator, dtype=torch.float64).log_().neg_().float()
