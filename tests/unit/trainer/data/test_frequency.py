"""A draft vocabulary is chosen by what the target wrote and by what it would have written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import VOCAB, make_tiny_target
from tests.support.traces import TraceMaker

from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data import frequency
from updraft_trainer.data.frequency import choose_vocabulary, token_counts
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.data.teacher import LastHidden, TopK


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def target(model: Path) -> TargetHead:
    return read_head(model)


@pytest.fixture(scope="module")
def samples(model: Path) -> list[Sample]:
    maker = TraceMaker(model)
    return [read_sample(maker.data(seed), maker.expected) for seed in range(4)]


def test_a_token_counts_where_it_stands_and_where_the_target_expects_it(
    samples: list[Sample], target: TargetHead
) -> None:
    expected = torch.zeros(VOCAB)
    for sample in samples:
        expected += torch.bincount(sample.ids, minlength=VOCAB)
        assert isinstance(sample.teacher, LastHidden)
        expected += torch.nn.functional.linear(sample.teacher.states.float(), target.head.float()).softmax(-1).sum(0)
    torch.testing.assert_close(token_counts(samples, target), expected, rtol=0.05, atol=0.02)


def test_some_rows_stand_for_all(samples: list[Sample], target: TargetHead, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows = sum(len(sample.teacher) for sample in samples)
    whole = token_counts(samples, target)
    monkeypatch.setattr(frequency, "MAX_ROWS", num_rows // 3)
    some = token_counts(samples, target)
    assert not torch.equal(some, whole)
    assert float(some.sum()) == pytest.approx(float(whole.sum()), rel=0.1)


def test_a_token_that_was_never_written_comes_in_if_the_target_expects_it(
    samples: list[Sample], target: TargetHead
) -> None:
    sample, unwritten = samples[0], VOCAB - 1
    assert unwritten not in sample.ids
    likely = TopK(torch.full((sample.num_rows, 1), unwritten), torch.full((sample.num_rows, 1), -0.5))
    assert unwritten not in choose_vocabulary([], target, size=8)
    assert unwritten in choose_vocabulary([replace(sample, teacher=likely)], target, size=8)
