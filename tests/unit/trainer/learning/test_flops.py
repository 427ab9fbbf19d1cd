"""Operations are counted from shapes as torch counts them while a step runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.likeliest import show_likeliest
from tests.support.tiny_target import make_tiny_target
from tests.support.traces import TraceMaker
from torch.utils.flop_counter import FlopCounterMode

from updraft_draft.layout import Span
from updraft_draft.target_weights import read_head
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.learning.compute import Compute
from updraft_trainer.learning.flops import num_pairs
from updraft_trainer.learning.learner import Hyperparameters, Learner


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target")


def _samples(target: Path, *, k: int = 0) -> Iterator[Sample]:
    maker = TraceMaker(target)
    for seed in range(4):
        trace = maker.trace(seed, counterfactual_rows=2)
        shown = show_likeliest(trace, read_head(target).head, k=k) if k else trace
        yield read_sample(shown.SerializeToString(), maker.expected)


@pytest.mark.parametrize(
    ("hyper", "k"),
    [
        pytest.param(Hyperparameters(), 0, id="hidden states"),
        pytest.param(Hyperparameters(), 4, id="top k"),
        pytest.param(Hyperparameters(trains_head=True), 0, id="the head too"),
        pytest.param(Hyperparameters(ttt_steps=1), 0, id="one step"),
        pytest.param(Hyperparameters(discard_weight=0.5, ttt_steps=5), 0, id="branches"),
    ],
)
def test_a_steps_operations_are_those_that_torch_counts(target: Path, hyper: Hyperparameters, k: int) -> None:
    head = read_head(target)
    learner = Learner(
        head, head.draft(), torch.arange(head.draft().draft_vocab_size), hyper, compute=Compute(dtype=torch.float32)
    )
    samples = list(_samples(target, k=k))
    with FlopCounterMode(
        display=False
    ) as counter:  # it does not see attention on a CPU, which is little in short texts
        report = learner.train(samples)
    assert report.num_rows > 0
    assert learner.times.take().flops == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("span", [Span(0, 6), Span(4, 9, 0, 4), Span(12, 15, 3, 8)])
def test_pairs_of_attention_are_those_that_a_mask_would_show(span: Span) -> None:
    num_steps = 3
    pairs = 0
    for step in range(num_steps):
        for row in range(span.first, span.end):
            texts = sum(span.context <= key < span.context_end or span.first <= key <= row for key in range(span.end))
            pairs += texts + step
    assert num_pairs(span, num_steps) == pairs
