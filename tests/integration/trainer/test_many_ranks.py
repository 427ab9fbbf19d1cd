"""Ranks that train together learn what one process learns from all their samples, and a bad one does not stop the others.

The ranks are processes that sum gradients by gloo. Passes run in float32.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.likeliest import show_likeliest
from tests.support.ranks import run_ranks
from tests.support.tiny_target import DRAFT_VOCAB, make_tiny_target
from tests.support.traces import TraceMaker
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from updraft_draft.target_weights import read_head
from updraft_draft.tensors import EncodedRows
from updraft_trainer.coordination.ranks import ALONE, Ranks
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.learning.compute import Compute, Sharding
from updraft_trainer.learning.gradients import StepReport
from updraft_trainer.learning.learner import MAX_BAD_STEPS, Hyperparameters, Learner
from updraft_trainer.learning.optimizer import DraftOptimizer

RELATIVE = 1e-6

HYPER = Hyperparameters(ttt_steps=4, discard_weight=0.5, trains_head=True, learning_rate=1e-4, warmup_steps=0)
"""AdamW divides gradients by their own size, also where they are rounding errors of sums in another order. With a higher
learning rate, weights differ by that within a few steps."""


@dataclass(frozen=True)
class Outcome:
    """Reports of all steps, gradients of the first one, and the learner's state and warnings after the last one."""

    reports: list[StepReport]
    gradients: dict[str, Tensor]
    state: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def samples(target: Path) -> list[Sample]:
    """Samples of unequal lengths and probabilities. A third have the likeliest tokens as teacher."""
    maker, head = TraceMaker(target), read_head(target).head
    traces = [maker.trace(seed, num_output=8 + 11 * (seed % 4), counterfactual_rows=2) for seed in range(12)]
    traces = [show_likeliest(one, head, k=12) if n % 3 == 2 else one for n, one in enumerate(traces)]
    read = [read_sample(one.SerializeToString(), maker.expected) for one in traces]
    return [replace(one, probability=1.0 if n % 2 else 0.3) for n, one in enumerate(read)]


def make_learner(target: Path, compute: Compute) -> Learner:
    head = read_head(target)
    return Learner(head, head.draft(draft_vocab_size=DRAFT_VOCAB), torch.arange(DRAFT_VOCAB), HYPER, compute=compute)


def train(
    ranks: Ranks,
    target: Path,
    batches: Sequence[Sequence[list[Sample]]],
    pack_tokens: int,
    sharding: Sharding = "auto",
    state: dict[str, Any] | None = None,
) -> Outcome:
    """Train on the samples of each step that are this rank's, from random weights or from a state on."""
    records = list[str]()
    compute = Compute(dtype=torch.float32, pack_tokens=pack_tokens, sharding=sharding).on_ranks(ranks)
    learner = make_learner(target, compute)
    if state is not None:
        learner.load_state_dict(state)
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("updraft_trainer.learning.learner")
    logger.addHandler(handler)
    reports, gradients = list[StepReport](), dict[str, Tensor]()
    for batch in batches:
        reports.append(learner.train(batch[ranks.rank]))
        named = learner.network.named_parameters()
        gradients = gradients or {name: p.grad.clone() for name, p in named if p.grad is not None}
    logger.removeHandler(handler)
    learner.collect()
    return Outcome(reports, gradients, learner.state_dict(), records)


def together(batches: Sequence[Sequence[list[Sample]]]) -> list[list[list[Sample]]]:
    """The samples of all ranks for one process."""
    return [[[sample for of_rank in batch for sample in of_rank]] for batch in batches]


def assert_close(mine: object, other: object, name: str = "state") -> None:
    if isinstance(mine, dict) and isinstance(other, dict):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert_close(value, other[key], f"{name}.{key}")
    elif isinstance(mine, Tensor) and isinstance(other, Tensor):
        error = (mine.double() - other.double()).norm().item()
        assert error <= RELATIVE * other.double().norm().item(), f"{name}: {error}"


def assert_equal(mine: object, other: object, name: str = "state") -> None:
    if isinstance(mine, dict) and isinstance(other, dict):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert_equal(value, other[key], f"{name}.{key}")
    elif isinstance(mine, Tensor) and isinstance(other, Tensor):
        assert torch.equal(mine, other), name
    else:
        assert mine == other, name


@pytest.mark.parametrize("pack_tokens", [60, 4096])
def test_two_ranks_learn_what_one_learns_from_the_samples_of_both(
    target: Path, samples: list[Sample], pack_tokens: int
) -> None:
    """Also in steps in which a rank has no samples, or none of them has any."""
    batches: list[list[list[Sample]]] = [
        [samples[0:3], samples[3:5]],
        [samples[5:6], []],
        [[], samples[6:9]],
        [[], []],
        [samples[9:10], samples[10:12]],
    ]
    first, second = run_ranks(train, target, batches, pack_tokens)
    alone = train(ALONE, target, together(batches), pack_tokens)
    assert first.reports == second.reports
    assert_equal(first.state, second.state)
    assert [one.num_rows for one in first.reports] == [one.num_rows for one in alone.reports]
    for mine, other in zip(first.reports, alone.reports, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=RELATIVE)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=RELATIVE)
    assert_close(first.gradients, alone.gradients)
    assert_close(first.state, alone.state)


def test_a_rank_whose_batch_is_not_finite_is_named_and_the_others_go_on(target: Path, samples: list[Sample]) -> None:
    bad = replace(samples[0], aux=EncodedRows.of(torch.full_like(samples[0].aux.decoded(), float("nan"))))
    batches = [[samples[:2], samples[2:4]], [samples[4:6], [bad, samples[6]]], [samples[6:8], samples[8:10]]]
    first, second = run_ranks(train, target, batches, 4096)
    assert [one.left_out for one in first.reports] == [(), (1,), ()]
    assert not any(one.is_skipped for one in first.reports)
    assert first.reports[1].num_rows < sum(len(one.ids) for one in samples[4:6])
    assert first.warnings == ["Loss or gradients are not finite on rank 1; step 1 goes on without it"]
    assert second.warnings == []
    assert first.state["step"] == 3
    assert_equal(first.state, second.state)
    without = [batches[0], [samples[4:6]], batches[2]]
    alone = train(ALONE, target, together(without), 4096)
    assert first.reports[1].loss == pytest.approx(alone.reports[1].loss, rel=0.1), "as if the bad rank had no samples"


def test_a_step_that_is_bad_on_all_ranks_changes_nothing_on_any(target: Path, samples: list[Sample]) -> None:
    bad = replace(samples[0], aux=EncodedRows.of(torch.full_like(samples[0].aux.decoded(), float("nan"))))
    batches = [[[samples[1]], [samples[2]]], *[[[bad], [bad]]] * (MAX_BAD_STEPS + 1), [[samples[3]], [samples[4]]]]
    first, second = run_ranks(train, target, batches, 4096)
    assert [one.is_skipped for one in second.reports] == [False, *[True] * (MAX_BAD_STEPS + 1), False]
    assert [one.num_rows for one in first.reports[1:-1]] == [0] * (MAX_BAD_STEPS + 1)
    assert second.state["step"] == 2
    assert_equal(first.state, second.state)


def train_short_of_memory(ranks: Ranks, target: Path, batches: Sequence[Sequence[list[Sample]]], limit: int) -> Outcome:
    """Train; on rank 1 passes of more than `limit` rows do not fit."""
    if ranks.rank == 1:
        register_module_forward_pre_hook(partial(_refuse, limit))
    return train(ranks, target, batches, 2 * limit)


def _refuse(limit: int, module: object, inputs: tuple[Tensor, ...]) -> None:
    if isinstance(module, torch.nn.Linear) and len(inputs[0]) > limit:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_rank_out_of_memory_tries_again_alone_and_the_step_is_the_same(target: Path, samples: list[Sample]) -> None:
    longest = max(one.num_rows for one in samples)
    batches = [[samples[:5], samples[5:10]], [samples[3:8], samples[:5]]]
    first, second = run_ranks(train_short_of_memory, target, batches, 2 * longest)
    assert first.warnings == []
    assert second.warnings == [f"The device is out of memory; passes have {2 * longest:,} tokens from now on"]
    alone = train(ALONE, target, together(batches), 4096)
    assert_close(first.gradients, alone.gradients)
    assert_equal(first.state, second.state)


def test_a_rank_whose_samples_never_fit_is_left_out_of_the_mean(target: Path, samples: list[Sample]) -> None:
    batches = [[samples[:2], samples[2:4]]]
    first, second = run_ranks(train_short_of_memory, target, batches, 4)
    assert "with a request of" in second.warnings[1]
    assert first.reports == second.reports
    assert first.reports[0].left_out == ()
    alone = train(ALONE, target, [[samples[:2]]], 4096)
    assert first.reports[0].loss == pytest.approx(alone.reports[0].loss, rel=0.1)
    assert first.reports[0].grad_norm == pytest.approx(alone.reports[0].grad_norm, rel=0.1)
    assert_equal(first.state, second.state)


def test_ranks_that_divide_the_optimizer_learn_the_same_and_rank_0_has_the_whole_state(
    target: Path, samples: list[Sample]
) -> None:
    """And training goes on from that state with any number of ranks."""
    batches = [[samples[0:3], samples[3:5], []], [samples[5:6], [], samples[6:9]], [samples[9:10], samples[10:12], []]]
    whole = run_ranks(train, target, batches, 4096, "replicate", size=3)
    parts = run_ranks(train, target, batches, 4096, "shard", size=3)
    assert parts[0].reports == parts[1].reports == parts[2].reports
    assert_close(parts[0].state, whole[0].state)
    for one in parts[1:]:
        assert_equal(one.state["network"], parts[0].state["network"])
        assert_equal(one.state["average"], {name: one.state["network"][name] for name in one.state["average"]})
    more = [[samples[0:3], samples[3:5]], [samples[5:6], []]]
    two = run_ranks(train, target, more, 4096, "shard", parts[0].state)
    alone = train(ALONE, target, together(more), 4096, "auto", whole[0].state)
    assert_close(two[0].state, alone.state)


def test_ranks_that_divide_the_optimizer_return_to_the_last_good_weights(target: Path, samples: list[Sample]) -> None:
    bad = replace(samples[0], aux=EncodedRows.of(torch.full_like(samples[0].aux.decoded(), float("nan"))))
    batches = [[[samples[1]], [samples[2]]], *[[[bad], [bad]]] * (MAX_BAD_STEPS + 1), [[samples[3]], [samples[4]]]]
    whole = run_ranks(train, target, batches, 4096, "replicate")
    parts = run_ranks(train, target, batches, 4096, "shard")
    assert_close(parts[0].state, whole[0].state)
    assert_equal(parts[1].state["network"], parts[0].state["network"])


def exchange_parts(ranks: Ranks) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two steps on a tensor with fewer elements than ranks and another one; the second tensor's moments are forgotten once."""
    few, more = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    optimizer = DraftOptimizer([few, more], ranks, is_sharded=True)
    before = optimizer.state_dict()
    for step in range(2):
        few.grad, more.grad = torch.full_like(few, 0.5), more.detach().clone()
        optimizer.step(0.1)
        if not step:
            optimizer.forget(more)
    optimizer.collect()
    return before, {"few": few.detach(), "more": more.detach(), **(optimizer.state_dict() if ranks.leads else {})}


def test_a_tensor_of_fewer_elements_than_ranks_is_updated_too() -> None:
    (before, first), (_, second), (_, third) = run_ranks(exchange_parts, size=3)
    few, more = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    whole = DraftOptimizer([few, more], ALONE, is_sharded=False)
    assert_equal(before["state"], {})
    for step in range(2):
        few.grad, more.grad = torch.full_like(few, 0.5), more.detach().clone()
        whole.step(0.1)
        if not step:
            whole.forget(more)
    assert_equal(first, {"few": few.detach(), "more": more.detach(), **whole.state_dict()})
    assert_equal({name: first[name] for name in second}, second)
    assert_equal(second, third)


def test_the_optimizer_is_divided_when_it_would_take_much_of_the_memory() -> None:
    pair = Compute(ranks=Ranks(0, 2), memory_bytes=96_000)
    assert not pair.is_sharded(1_000)
    assert pair.is_sharded(1_001)
    assert not replace(pair, ranks=ALONE).is_sharded(1_001)
    assert not replace(pair, sharding="replicate").is_sharded(1_001)
    assert replace(pair, sharding="shard").is_sharded(1)
    assert not replace(pair, sharding="shard", ranks=ALONE).is_sharded(1)
    assert not replace(pair, memory_bytes=0).is_sharded(10**12)
    assert Compute().on_ranks(ALONE).memory_bytes > 0
