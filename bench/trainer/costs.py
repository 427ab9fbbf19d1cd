"""Costs of options and kernels: ratios of times on this machine, of medians of paired runs."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench import harness
from bench.trainer.recordings import recorded
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from updraft_draft import chain_attention
from updraft_draft.layout import Span
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import Sample
from updraft_trainer.learning.compiled import Compiler
from updraft_trainer.learning.compute import Compute
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.learning.losses import Predictions, forward_kl, forward_kl_by_torch

HEADS, SIZE = 9, 128
LENGTHS = (128, 512, 2048)

CALLS = 20
"""Number of calls in one measurement, for work of less than a millisecond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A time over another one."""

    name: str
    ratio: float
    of: str


def measure(num_threads: int, rounds: int) -> list[Cost]:
    torch.set_num_threads(num_threads)
    folder = harness.model()
    target, batches = read_head(folder), recorded(1 + rounds)
    arms = {name: _learner(target, batches, compute) for name, compute in _computes().items()}
    steps = _paired({name: [_step(arm, batch) for batch in batches] for name, arm in arms.items()})
    found = [Cost(name=f"a step with {name}", ratio=ratio, of="a step") for name, ratio in steps.items()]
    found.append(_products(arms[""], batches[0]))
    found.append(_loss(arms[""].network.config.draft_vocab_size, rounds))
    for length in LENGTHS:
        found += _attention(length, rounds)
    return found


def _computes() -> dict[str, Compute]:
    return {
        "": Compute(),
        "recompute": Compute(recompute=True),
        "compile": Compute(compiler=Compiler()),
        "passes in float32": Compute(dtype=torch.float32),
        "passes in bfloat16": Compute(dtype=torch.bfloat16),
    }


def _learner(target: TargetHead, batches: Sequence[Sequence[Sample]], compute: Compute) -> Learner:
    config = target.draft()
    ids = choose_vocabulary([one for batch in batches for one in batch], target, size=config.draft_vocab_size)
    return Learner(target, config, ids, Hyperparameters(), compute=compute)


def _step(learner: Learner, batch: list[Sample]) -> Callable[[], object]:
    return lambda: learner.train(batch)


def _paired(arms: dict[str, list[Callable[[], object]]]) -> dict[str, float]:
    """The median over rounds of each arm's time over that of the first arm, after a round that is not measured.

    Arms run in another order in each round: what ran before costs an arm its caches and its memory.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    rng = random.Random(0)
    for runs in zip(*arms.values(), strict=True):
        for name, run in rng.sample(list(zip(arms, runs, strict=True)), k=len(arms)):
            started_s = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started_s)
    first, *others = times
    return {
        name: statistics.median(one / base for one, base in zip(times[name][1:], times[first][1:], strict=True))
        for name in others
    }


def _loss(vocab_size: int, rounds: int) -> Cost:
    teacher, draft = torch.randn(2, 128, vocab_size).to(Compute().dtype).mul(4).unbind()

    def by_kernel() -> None:
        for _ in range(CALLS):
            forward_kl(draft, Predictions.of(teacher))

    def by_torch() -> None:
        for _ in range(CALLS):
            forward_kl_by_torch(draft, Predictions.by_torch(teacher))

    times = _paired({"": [by_kernel] * (1 + rounds), "by torch": [by_torch] * (1 + rounds)})
    return Cost(name="the loss of 128 rows by torch's operations", ratio=times["by torch"], of="the loss by the kernel")


def _products(learner: Learner, batch: list[Sample]) -> Cost:
    """Above this, no rewrite of all else makes a step faster."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded_times:
        learner.train(batch)
    times = {one.key: one.self_cpu_time_total for one in recorded_times.key_averages()}
    return Cost(name="matrix products", ratio=times["aten::mm"] / sum(times.values()), of="a step's processor time")


def _attention(length: int, rounds: int) -> list[Cost]:
    """One text of `length` rows, forward and backward, by torch's kernel in two dtypes, and without it."""
    span = (Span(0, length),)

    def run(dtype: torch.dtype, **kernel: Any) -> Callable[[], object]:
        q, k, v = (torch.randn(length, HEADS, SIZE).to(dtype).requires_grad_() for _ in range(3))
        return lambda: _forward_and_backward(q, k, v, span, kernel)

    arms = {
        "the usual call": run(torch.bfloat16),
        "torch's kernel in bfloat16": run(torch.bfloat16, _SHORT=0),
        "torch's kernel in float32": run(torch.float32),
        "blocks of rows": run(torch.bfloat16, _has_kernel=_never),
    }
    ratios = _paired({name: [one] * (1 + rounds) for name, one in arms.items()})
    of = f"attention as it is called for {length:,} rows"
    return [Cost(name=name, ratio=ratio, of=of) for name, ratio in ratios.items()]


def _forward_and_backward(q: Tensor, k: Tensor, v: Tensor, spans: tuple[Span, ...], kernel: Mapping[str, Any]) -> None:
    """`kernel`: names of `chain_attention` that choose how it computes, and other values for them."""
    usual = {name: getattr(chain_attention, name) for name in kernel}
    try:
        for name, value in kernel.items():
            setattr(chain_attention, name, value)
        chain_attention.chain_attention(q, k, v, spans).float().sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for name, value in usual.items():
            setattr(chain_attention, name, value)


def _never(_: Tensor) -> bool:
    return False
