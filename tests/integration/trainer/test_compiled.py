"""torch.compile as an option: the same gradients, no new code for other lengths, and no failure where it does not work."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.likeliest import show_likeliest
from tests.support.tiny_target import DRAFT_VOCAB, make_tiny_target
from tests.support.traces import TraceMaker
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from updraft_draft.target_weights import read_head
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.learning.compiled import Compiler
from updraft_trainer.learning.compute import Compute
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.learning.losses import acceptance, combined, forward_kl

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
    torch._dynamo.reset()
    counters.clear()


def samples_of(target: Path) -> list[Sample]:
    """Of many lengths and both teachers, with branches."""
    maker, head = TraceMaker(target), read_head(target).head
    traces = [maker.trace(seed, num_output=8 + 7 * seed, counterfactual_rows=2) for seed in range(6)]
    traces = [show_likeliest(one, head, k=12) if n % 2 else one for n, one in enumerate(traces)]
    return [read_sample(one.SerializeToString(), maker.expected) for one in traces]


def make_learner(target: Path, compiler: Compiler | None = None) -> Learner:
    head, hyper = read_head(target), Hyperparameters(discard_weight=0.5, clip_norm=1e9)
    compute = Compute(dtype=torch.float32, compiler=compiler)
    return Learner(head, head.draft(draft_vocab_size=DRAFT_VOCAB), torch.arange(DRAFT_VOCAB), hyper, compute=compute)


@needs_compiler
def test_compiled_steps_are_exact_and_are_not_compiled_again_for_other_lengths(
    target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    samples = samples_of(target)
    fast, usual = make_learner(target, Compiler()), make_learner(target)
    num_graphs = 0
    for batch in (samples[:2], samples[2:4], samples, samples[5:]):
        report, expected = fast.train(batch), usual.train(batch)
        assert report.loss == pytest.approx(expected.loss, rel=1e-4)
        assert report.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
        num_graphs = num_graphs or counters["stats"]["unique_graphs"]
    assert num_graphs > 0
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert "Compiled the training step" in caplog.text


WARNING = "Training goes on without torch.compile, because it does not work here: no g++"


class BrokenCompiler(Compiler):
    """Functions that have rows in their first argument work until `fails_from` of them."""

    def __init__(self, fails_from: int) -> None:
        super().__init__()
        self._fails_from = fails_from

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.has_failed:
            return function

        def failing(*args: Any) -> Any:
            if any(isinstance(one, Tensor) and one.shape[0] >= self._fails_from for one in args):
                raise TorchDynamoException("no g++")
            return function(*args)

        return failing


@pytest.mark.parametrize(
    "fails_from", [pytest.param(1, id="at once"), pytest.param(100, id="for more rows than before")]
)
def test_where_no_compiler_works_training_goes_on_and_says_why_once(
    target: Path, caplog: pytest.LogCaptureFixture, fails_from: int
) -> None:
    samples, compiler = samples_of(target), BrokenCompiler(fails_from)
    learner, usual = make_learner(target, compiler), make_learner(target)
    assert learner.train(samples) == usual.train(samples)
    assert compiler.has_failed
    assert learner.continuing(learner.network).train(samples).num_rows
    assert [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING] == [WARNING]


def test_only_the_first_learner_of_a_process_warms_the_compiler_up() -> None:
    compiler, calls = Compiler(), list[int]()
    for number in (1, 2):
        compiler.warm_up(lambda number=number: calls.append(number))  # type: ignore[misc]
    assert calls == [1]


def test_what_is_compiled_is_a_phase_of_its_own_before_the_first_step(target: Path) -> None:
    samples, compiler, compiled = samples_of(target), Compiler(), list[str]()

    @contextmanager
    def during() -> Iterator[None]:
        compiled.append("begins")
        yield
        compiled.append("ends")

    compiler.during = during
    compiler.compiled = lambda function: function  # type: ignore[method-assign]  # without a compiler
    learner = make_learner(target, compiler)
    assert learner.is_cold
    seconds = learner.warm_up()
    spent = learner.times.take()
    assert (compiled, learner.is_cold, learner.step) == (["begins", "ends"], False, 0)
    assert (list(spent.seconds), spent.flops) == (["compile"], 0.0)
    assert seconds >= spent.seconds["compile"] > 0.0
    learner.train(samples)
    assert "compile" not in learner.times.take().seconds
    assert learner.warm_up() == 0.0
    assert not make_learner(target).is_cold


def test_the_same_combination_of_losses_is_compiled_once() -> None:
    assert combined(forward_kl, acceptance, 0.5) is combined(forward_kl, acceptance, 0.5)
