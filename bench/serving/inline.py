"""The scheduler on the caller's thread, one step at a time: seconds per step, and the share of the target in them.

Nothing else runs on the thread, so the rest is the overhead of the engine.
"""

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from bench.serving.arms import RunSpec, request
from bench.serving.plan import LOOKAHEAD
from torch import Tensor

from updraft_inference.engine import Delta, Drafter
from updraft_inference.torch_engine.drafting.ngram import NgramProposer
from updraft_inference.torch_engine.model.kv_cache import Batch, SlotCache
from updraft_inference.torch_engine.model.limits import Limits
from updraft_inference.torch_engine.model.target import ForwardOutput, Target
from updraft_inference.torch_engine.scheduler.scheduler import Scheduler
from updraft_inference.torch_engine.sequence import Sequence
from updraft_kernels.loader import load_kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds of one step, and of the target in it."""

    step_s: float
    forward_s: float
    logits_s: float


class TimedTarget(Target):
    """A target that adds up its computing time."""

    forward_s = 0.0
    logits_s = 0.0

    def forward(self, ids_R: Tensor, batches: SequenceOf[Batch], cache: SlotCache) -> ForwardOutput:  # noqa: N803 - the target's own name
        started = time.perf_counter()
        try:
            return super().forward(ids_R, batches, cache)
        finally:
            self.forward_s += time.perf_counter() - started

    def logits(self, last: Tensor) -> Tensor:
        started = time.perf_counter()
        try:
            return super().logits(last)
        finally:
            self.logits_s += time.perf_counter() - started


class Inline:
    """A scheduler that is stepped by hand; `num_tokens` counts the new tokens of its sequences."""

    def __init__(self, target: TimedTarget, limits: Limits) -> None:
        self.limits = limits
        self.num_tokens = 0
        self._target = target
        self._scheduler = Scheduler(target, limits, default=Drafter.NONE)

    @classmethod
    def open(
        cls, model: Path, *, num_slots: int, max_context: int, dtype: torch.dtype, has_kernels: bool = True
    ) -> Self:
        """Load the model on the CPU, with the C++ kernels or with torch's operations only."""
        library = load_kernels() if has_kernels else None
        target = TimedTarget.open(model, dtype=dtype, device=torch.device("cpu"), library=library)
        return cls(target, Limits(num_slots=num_slots, max_context=max_context, max_lookahead=LOOKAHEAD))

    def look_up_in(self, lookups: NgramProposer) -> None:
        """Use an n-gram proposer that remembers earlier answers."""
        self._scheduler.speculation.ngram = lookups

    def start(self, prompts: SequenceOf[tuple[int, ...]], *, max_tokens: int, drafter: Drafter | None) -> None:
        """Add greedy requests that ignore end tokens, and read all their prompts."""
        unread = set()
        spec = RunSpec(batch=len(prompts), tokens=max_tokens, drafter=drafter)
        for prompt in prompts:
            generation = request(prompt, spec)
            name = generation.request_id
            unread.add(name)

            def take(delta: Delta, name: str = name) -> None:
                unread.discard(name)
                self.num_tokens += len(delta.token_ids)

            self._scheduler.add(Sequence(request=generation, emit=take, ids=list(prompt)))
        while unread:
            self._scheduler.step()

    def step(self) -> Spent:
        target = self._target
        forward_s, logits_s, started = target.forward_s, target.logits_s, time.perf_counter()
        self._scheduler.step()
        return Spent(
            step_s=time.perf_counter() - started,
            forward_s=target.forward_s - forward_s,
            logits_s=target.logits_s - logits_s,
        )

    def stop(self) -> None:
        self._scheduler.cancel_all()
