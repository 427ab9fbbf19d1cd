"""Sampling with a seed, such that the output is the seed's alone: no draft, lookahead or batch neighbour has a say in it.

Each position has noise of its own, which seed and position fix, and the token is the first to arrive in a race of
exponential clocks with rates p (the Gumbel-max rule): distributed as p, and the same one whether a draft guessed it or
not. A draft is kept where it is that token. Speculative sampling would keep more of a drawn draft, but how much
randomness it uses depends on the drafts, and the adaptive lookahead depends on the machine's speed.
"""

import hashlib
import struct

import torch
from torch import Tensor


def draws(p_TV: Tensor, seed: int, position: int) -> list[int]:
    """One token a row, distributed as p (float32, on the CPU): row i is the output's token `position` + i."""
    return [int((p / clocks(seed, position + i, len(p))).argmax()) for i, p in enumerate(p_TV)]


def clocks(seed: int, position: int, num: int) -> Tensor:
    """Exponential(1) variates, float32 [num]: those of a position are independent of all others."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed % 2**64, position), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(num).exponential_(generator=generator)
