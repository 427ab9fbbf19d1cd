"""torch.compile as an option: the same gradients, no new code for other lengths, and no failure where it does not work."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from tests.support.likeliest import show_likeliest
from tests.support.tiny_target import DRAFT_VOCAB, make_tiny_target
from tests.support.traces import TraceMaker
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from updraft_draft.target_weights import read_head
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.learning import compiled
from updraft_trainer.learning.compute import Compute
from updraft_trainer.learning.learner import Hyperparameters, Learner

pytestmark = [  # of torch's compiler itself
    pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet() -> None:
    compiled.compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()


def samples_of(target: Path) -> list[Sample]:
    """Of many lengths and both teachers, with branches."""
    maker, head = TraceMaker(target), read_head(target).head
    traces = [maker.trace(seed, num_output=8 + 7 * seed, counterfactual_rows=2) for seed in range(6)]
    traces = [show_likeliest(one, head, k=12) if n % 2 else one for n, one in enumerate(traces)]
    return [read_sample(one.SerializeToString(), maker.expected) for one in traces]


def make_learner(target: Path, *, compiles: bool) -> Learner:
    head, hyper = read_head(target), Hyperparameters(discard_weight=0.5, clip_norm=1e9)
    compute = Compute(dtype=torch.float32, compiles=compiles)
    return Learner(head, head.draft(draft_vocab_size=DRAFT_VOCAB), torch.arange(DRAFT_VOCAB), hyper, compute=compute)


@needs_compiler
def test_compiled_steps_are_exact_and_are_not_compiled_again_for_other_lengths(
    target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    samples = samples_of(target)
    fast, usual = make_learner(target, compiles=True), make_learner(target, compiles=False)
    num_graphs = 0
    for batch in (samples[:2], samples[2:4], samples, samples[5:]):
        report, expected = fast.train(batch), usual.train(batch)
        assert report.loss == pytest.approx(expected.loss, rel=1e-4)
        assert report.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
        num_graphs = num_graphs or counters["stats"]["unique_graphs"]
    assert num_graphs > 0
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert "Compiled the training step" in caplog.text


def test_without_a_compiler_training_goes_on_and_says_why(
    target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/g++",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    learner, usual, samples = (
        make_learner(target, compiles=True),
        make_learner(target, compiles=False),
        samples_of(target),
    )
    assert learner.train(samples).loss == usual.train(samples).loss
    assert learner.train(samples).loss == usual.train(samples).loss
    assert caplog.text.count("goes on without torch.compile") == 1
