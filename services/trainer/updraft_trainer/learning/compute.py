"""Where and how a draft is trained: one code path for CPU and CUDA."""

from dataclasses import dataclass, field
from typing import Self

import torch

from updraft_chassis.errors import Conflict
from updraft_trainer.learning.ranks import ALONE, Ranks

PACK_TOKENS = {"cpu": 1024, "cuda": 16_384}
"""Rows of a pass by default. A CPU should gain nothing from more. A GPU needs large products; its value is an
estimate: 16,384 rows of an 8B target's draft keep about 12 GB at 3 steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """`dtype` of passes; weights, optimizer state and divergence are float32. `pack_tokens`: rows of a forward and backward
    pass, of which a step may need several. `recompute`: gradient checkpointing. `ranks`: the processes that train together."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.bfloat16
    pack_tokens: int = PACK_TOKENS["cpu"]
    recompute: bool = False
    ranks: Ranks = ALONE

    @classmethod
    def on(cls, device: str, *, pack_tokens: int | None = None, recompute: bool = False) -> Self:
        """On "auto", "cpu" or "cuda". Conflict if that is "cuda" and torch sees no GPU."""
        has_gpu = torch.cuda.is_available()
        if device == "cuda" and not has_gpu:
            raise Conflict("UPDRAFT_TRAINER_DEVICE is cuda, but torch sees no GPU; set it to auto or cpu, or add a GPU")
        chosen = ("cuda" if has_gpu else "cpu") if device == "auto" else device
        return cls(device=torch.device(chosen), pack_tokens=pack_tokens or PACK_TOKENS[chosen], recompute=recompute)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
