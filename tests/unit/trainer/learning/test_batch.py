"""Branches stand behind the texts of a batch, and all of them have their turn."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import HIDDEN, make_draft
from tests.support.traces import TraceMaker
from torch import Tensor

from updraft_draft.network import DraftNetwork
from updraft_trainer.data.sample import Counterfactual, Sample, read_sample
from updraft_trainer.data.teacher import LastHidden, Teacher
from updraft_trainer.learning.batch import Batch, TrainingRows

KNOWN = torch.ones(512, dtype=torch.bool)


@pytest.fixture
def samples(traces: TraceMaker) -> list[Sample]:
    """Of unequal lengths, each with two rows after every rejection; the last one without any. No teacher comes twice."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for seed in range(3):
        data = traces.data(seed, num_prompt=3 + seed, num_output=12 + 9 * seed, counterfactual_rows=2)
        sample = read_sample(data, traces.expected)
        branches = [
            replace(one, teacher=LastHidden(torch.randn(2, HIDDEN, generator=generator)))
            for one in sample.counterfactuals
        ]
        made.append(replace(sample, counterfactuals=tuple(branches) if seed < 2 else ()))
    return made


@pytest.fixture
def draft(tiny_target: Path) -> DraftNetwork:
    return make_draft(tiny_target)


@pytest.mark.parametrize("num_steps", [1, 3, 5])
def test_a_branch_has_the_states_that_its_text_alone_has(
    samples: list[Sample], draft: DraftNetwork, num_steps: int
) -> None:
    batch = Batch.of(samples, num_steps=num_steps, known=KNOWN).with_branches(samples, turn=1, known=KNOWN)
    assert batch.discarded is not None
    states = draft.unroll_tree(batch.aux.float(), batch.tree, first_row=batch.first_row)
    branches = [(sample, one) for sample in samples for one in sample.counterfactuals]
    compared = set()
    for j, state in enumerate(states):
        for b, column, index in zip(*(field.tolist() for field in batch.discarded.of_step(j)), strict=True):
            (sample, one), n = _owner(branches, hidden(batch.discarded)[index])
            assert sample is samples[b]
            aux = torch.cat([sample.aux[: one.start], one.aux]).float()[None]
            ids = torch.cat([sample.ids[1 : one.start], one.ids, torch.zeros(num_steps, dtype=torch.long)])[None]
            alone = draft.unroll(aux, ids, num_steps=num_steps)[j][0, one.start + n - 1 - j]
            torch.testing.assert_close(state[b, column], alone, rtol=1e-4, atol=1e-5)
            compared.add((j, n))
    assert compared == {(j, n) for j in range(num_steps) for n in range(2)}


def hidden(of: TrainingRows | Counterfactual) -> Tensor:
    """Last hidden states of rows that all have some, or of a branch."""
    teacher: Teacher
    (teacher,) = of.teachers if isinstance(of, TrainingRows) else (of.teacher,)
    assert isinstance(teacher, LastHidden)
    return teacher.states


def _owner(branches: list[tuple[Sample, Counterfactual]], teacher: Tensor) -> tuple[tuple[Sample, Counterfactual], int]:
    """The branch and the row in it that this last hidden state comes from."""
    return next(
        (branch, n) for branch in branches for n, row in enumerate(hidden(branch[1])) if torch.equal(row, teacher)
    )


def test_texts_are_unrolled_as_without_branches(samples: list[Sample], draft: DraftNetwork) -> None:
    plain = Batch.of(samples, num_steps=3, known=KNOWN)
    grown = plain.with_branches(samples, turn=0, known=KNOWN)
    alone = draft.unroll_tree(plain.aux.float(), plain.tree, first_row=plain.first_row)
    for one, state in zip(
        alone, draft.unroll_tree(grown.aux.float(), grown.tree, first_row=grown.first_row), strict=True
    ):
        torch.testing.assert_close(state[:, : one.shape[1]], one, rtol=1e-4, atol=1e-5)
        assert bool(torch.isfinite(state).all()), "rows that pad see themselves"


def test_a_step_takes_branches_of_about_half_the_texts_rows_and_all_have_their_turn(samples: list[Sample]) -> None:
    sample = samples[1]
    batch, teachers = Batch.of([sample], num_steps=3, known=KNOWN), set[tuple[float, ...]]()
    for turn in range(len(sample.counterfactuals)):
        grown = batch.with_branches([sample], turn=turn, known=KNOWN)
        assert grown.aux.shape[1] <= 1.5 * sample.num_rows + 4
        assert grown.discarded is not None
        teachers.update(tuple(row) for row in hidden(grown.discarded).tolist())
    assert teachers == {tuple(row) for one in sample.counterfactuals for row in hidden(one).tolist()}


def test_a_batch_without_rejections_is_as_it_was(samples: list[Sample]) -> None:
    batch = Batch.of(samples[2:], num_steps=3, known=KNOWN)
    assert batch.with_branches(samples[2:], turn=0, known=KNOWN) is batch


def test_training_rows_are_split_in_order_and_without_loss(samples: list[Sample]) -> None:
    rows = Batch.of(samples, num_steps=3, known=KNOWN).text
    parts = list(rows.split(5))
    assert [len(part) for part in parts[:-1]] == [5] * (len(parts) - 1)
    again = TrainingRows.joined(parts)
    assert torch.equal(hidden(again), hidden(rows))
    for field in ("sample", "column", "first", "corrections"):
        assert torch.equal(getattr(again, field), getattr(rows, field))
