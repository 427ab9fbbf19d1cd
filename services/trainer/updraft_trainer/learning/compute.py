"""Where and how a draft is trained: one code path for CPU and CUDA."""

import logging
import os
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch

from updraft_chassis.errors import Conflict
from updraft_draft.precision import product_dtype
from updraft_trainer.coordination.ranks import ALONE, Ranks
from updraft_trainer.learning.compiled import Compiler

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)
"""Minimum compute capability of GPUs: older ones have no products in bfloat16, or slow ones."""

PACK_TOKENS = {"cpu": 1024, "cuda": 16_384}
"""Rows of a pass by default. A CPU should gain nothing from more. A GPU needs large products; its value is an
estimate: 16,384 rows of an 8B target's draft keep about 12 GB at 3 steps."""

BATCH_TOKENS = {"cpu": None, "cuda": 16_384}
"""Captured tokens of an optimizer step by default; None: those of four requests, see `selection`. A GPU needs as many as a pass
holds, because each step reads and writes all weights several times."""

Sharding = Literal["auto", "replicate", "shard"]

BYTES_PER_WEIGHT = 24
"""Memory of a trained weight: itself, its gradient, AdamW's two moments, its average, its last good average."""

MEMORY_SHARE = 0.25
"""The rest is for the passes, the frozen embedding and heads, and drafts that are judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """`dtype` of passes; weights, optimizer state and divergence are float32. `pack_tokens`: rows of a forward and backward
    pass, of which a step may need several. `recompute`: gradient checkpointing. `compiler`: of parts of a step, one for a
    process, or none. `ranks`: the processes that train together.

    `sharding`: whether each keeps all of the optimizer's state ("replicate") or a part of it ("shard"). "auto" divides it if
    the learner would otherwise take more than a quarter of `memory_bytes`: those of the smallest device; 0: not known.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = field(default_factory=lambda: product_dtype(torch.device("cpu")))
    pack_tokens: int = PACK_TOKENS["cpu"]
    recompute: bool = False
    compiler: Compiler | None = None
    ranks: Ranks = ALONE
    sharding: Sharding = "auto"
    memory_bytes: int = 0

    @classmethod
    def on(
        cls, device: str, *, pack_tokens: int | None = None, recompute: bool = False, compiles: bool = False
    ) -> Self:
        """On "auto", "cpu" or "cuda". Conflict if that is "cuda" and there is no GPU to train on."""
        problem = _gpu_problem() if device != "cpu" else ""
        if device == "cuda" and problem:
            raise Conflict(f"UPDRAFT_TRAINER_DEVICE is cuda, but {problem}; set it to auto or cpu, or add a GPU")
        if problem and torch.cuda.is_available():
            logger.warning("Training on the CPU, because %s", problem)
        chosen = ("cpu" if problem else "cuda") if device == "auto" else device
        return cls(
            device=torch.device(chosen),
            dtype=product_dtype(torch.device(chosen)),
            pack_tokens=pack_tokens or PACK_TOKENS[chosen],
            recompute=recompute,
            compiler=Compiler() if compiles else None,
        )

    def on_ranks(self, ranks: Ranks) -> Self:
        """The same with these ranks, each on the GPU of its local rank. All of them call it. Conflict on all of them if some
        have a GPU to train on and others have none, because their sums would never meet."""
        kinds = ranks.broadcast_object(ranks.gather(self.device.type))
        odd = [str(rank) for rank, kind in enumerate(kinds) if kind == "cpu"]
        if 0 < len(odd) < len(kinds):
            raise Conflict(
                f"rank {', '.join(odd)} of {ranks.size} has no GPU to train on, but the others have one; give it a GPU with a"
                " driver that works, or set UPDRAFT_TRAINER_DEVICE of all ranks to cpu"
            )
        device = torch.device("cuda", ranks.local_rank) if self.device.type == "cuda" else self.device
        memory_bytes = ranks.broadcast_object(min(ranks.gather(_memory_bytes(device)), default=0))
        return replace(self, device=device, ranks=ranks, memory_bytes=memory_bytes)

    def is_sharded(self, num_weights: int) -> bool:
        """Whether the ranks divide the optimizer's state of so many trained weights."""
        if self.sharding == "auto":
            return self.ranks.size > 1 and 0 < MEMORY_SHARE * self.memory_bytes < num_weights * BYTES_PER_WEIGHT
        return self.ranks.size > 1 and self.sharding == "shard"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def _gpu_problem() -> str:
    """Why there is no GPU to train on, or an empty string."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    capability = torch.cuda.get_device_capability()
    if capability >= LEAST_CAPABILITY:
        return ""
    has, needed = (".".join(map(str, one)) for one in (capability, LEAST_CAPABILITY))
    return f"the GPU has compute capability {has}, and bfloat16 needs {needed}"


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
