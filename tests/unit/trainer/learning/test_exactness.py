"""Loss and gradients of packed, chunked passes are those of the formula, in which each text stands alone.

Passes run in float32 here; the reference in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import dense_reference
from tests.support.likeliest import show_likeliest
from tests.support.tiny_target import DRAFT_VOCAB, make_tiny_target
from tests.support.traces import TraceMaker

from updraft_draft import chain_attention
from updraft_draft.target_weights import read_head
from updraft_trainer.data import importance
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.learning import head_loss, losses
from updraft_trainer.learning.batch import selected
from updraft_trainer.learning.compute import Compute
from updraft_trainer.learning.learner import Hyperparameters, Learner

RELATIVE = 1e-5


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def samples(target: Path) -> list[Sample]:
    """Samples of unequal lengths. A third have the likeliest tokens as teacher; all have two rows after each rejection."""
    maker, head = TraceMaker(target), read_head(target).head
    traces = [
        maker.trace(seed, num_prompt=2 + 5 * (seed % 3), num_output=8 + 11 * (seed % 4), counterfactual_rows=2)
        for seed in range(9)
    ]
    traces = [show_likeliest(one, head, k=12) if n % 3 == 2 else one for n, one in enumerate(traces)]
    return [read_sample(one.SerializeToString(), maker.expected) for one in traces]


@pytest.fixture(scope="module")
def pool(samples: list[Sample]) -> Callable[[int], Sample]:
    """The samples by index, in a form that hypothesis can print."""

    def sample(n: int) -> Sample:
        return samples[n]

    return sample


def make_learner(target: Path, hyper: Hyperparameters, compute: Compute) -> Learner:
    head = read_head(target)
    every_second = torch.arange(0, head.config.vocab_size, 2)[:DRAFT_VOCAB]
    return Learner(head, head.draft(draft_vocab_size=len(every_second)), every_second, hyper, compute=compute)


def assert_exact(target: Path, batch: Sequence[Sample], hyper: Hyperparameters, compute: Compute) -> None:
    learner = make_learner(target, hyper, compute)
    exact = dense_reference.exact_copy(learner.network)
    counts = importance.weights([one.probability for one in batch])
    cuts = [selected(one, hyper.ttt_steps, learner.step) if hyper.discard_weight else () for one in batch]
    expected = dense_reference.loss(exact, read_head(target), batch, cuts, hyper, counts)
    expected.backward()  # type: ignore[no-untyped-call]
    report = learner.train(list(batch))
    assert report.loss == pytest.approx(expected.item(), rel=RELATIVE)
    named = dict(learner.network.named_parameters())
    for name, one in exact.named_parameters():
        gradient = named[name].grad
        assert (gradient is None) == (one.grad is None), name
        if one.grad is not None and gradient is not None:
            error = ((gradient - one.grad).norm() / one.grad.norm()).item()
            assert error < RELATIVE, f"{name}: {error}"


@settings(max_examples=20, deadline=None)
@given(
    chosen=st.lists(st.integers(0, 8), min_size=1, max_size=5, unique=True),
    hyper=st.builds(
        Hyperparameters,
        ttt_steps=st.integers(1, 7),
        discard_weight=st.sampled_from([0.0, 0.5]),
        loss=st.sampled_from(["forward_kl", "reverse_kl", "acceptance"]),
        acceptance_weight=st.sampled_from([0.0, 0.3]),
        trains_head=st.booleans(),
        clip_norm=st.just(1e9),
    ),
    compute=st.builds(
        Compute, dtype=st.just(torch.float32), pack_tokens=st.sampled_from([1, 60, 4096]), recompute=st.booleans()
    ),
)
def test_loss_and_gradients_are_those_of_each_text_alone(
    target: Path, pool: Callable[[int], Sample], chosen: list[int], hyper: Hyperparameters, compute: Compute
) -> None:
    assert_exact(target, [replace(pool(n), probability=1.0 if n % 2 else 0.4) for n in chosen], hyper, compute)


def test_chunks_of_rows_add_up_to_the_whole(
    target: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "MIN_CHUNK_ROWS", 5)
    monkeypatch.setitem(head_loss.LOGIT_BYTES, "cpu", 1)
    hyper = Hyperparameters(discard_weight=0.5, trains_head=True, clip_norm=1e9)
    assert_exact(target, samples[:5], hyper, Compute(dtype=torch.float32))


def test_it_is_exact_without_a_kernel_for_the_loss_too(
    target: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "is_native", lambda _: False)
    hyper = Hyperparameters(discard_weight=0.5, trains_head=True, clip_norm=1e9)
    assert_exact(target, samples[:5], hyper, Compute(dtype=torch.float32))


def test_it_is_exact_without_a_kernel_for_attention_too(
    target: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_attention, "_has_kernel", lambda _: False)
    monkeypatch.setattr(chain_attention, "_BLOCK", 7)
    hyper = Hyperparameters(discard_weight=0.5, ttt_steps=4, clip_norm=1e9)
    assert_exact(target, samples[:5], hyper, Compute(dtype=torch.float32))
