"""The largest relative error of a step in float32 against the formula in float64, in which each text stands alone."""

from pathlib import Path

import torch
from tests.support import dense_reference
from tests.support.likeliest import show_likeliest
from tests.support.tiny_target import DRAFT_VOCAB, make_tiny_target
from tests.support.traces import TraceMaker

from updraft_draft.target_weights import read_head
from updraft_trainer.data.sample import read_sample
from updraft_trainer.learning.batch import selected
from updraft_trainer.learning.compute import Compute
from updraft_trainer.learning.learner import Hyperparameters, Learner

SAMPLES = 6


def worst_error(folder: Path, num_steps: int) -> float:
    """Errors of the loss and of each tensor's gradient, for packed samples with branches and both teachers."""
    maker = TraceMaker(make_tiny_target(folder))
    target = read_head(folder)
    traces = [maker.trace(seed, num_output=8 + 11 * seed, counterfactual_rows=2) for seed in range(SAMPLES)]
    traces = [show_likeliest(one, target.head, k=12) if n % 2 else one for n, one in enumerate(traces)]
    samples = [read_sample(one.SerializeToString(), maker.expected) for one in traces]
    hyper = Hyperparameters(ttt_steps=num_steps, discard_weight=0.5, trains_head=True, clip_norm=1e9)
    config, token_ids = target.draft(draft_vocab_size=DRAFT_VOCAB), torch.arange(DRAFT_VOCAB)
    learner = Learner(target, config, token_ids, hyper, compute=Compute(dtype=torch.float32))
    exact = dense_reference.exact_copy(learner.network)
    cuts = [selected(one, num_steps, learner.step) for one in samples]
    expected = dense_reference.loss(exact, target, samples, cuts, hyper, [1.0] * SAMPLES)
    expected.backward()  # type: ignore[no-untyped-call]
    report = learner.train(samples)
    errors = [abs(report.loss / expected.item() - 1)]
    for mine, other in zip(learner.network.parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        errors.append(((mine.grad - other.grad).norm() / other.grad.norm()).item())
    return max(errors)
