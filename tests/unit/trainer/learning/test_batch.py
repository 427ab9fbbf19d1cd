"""Texts and branches are packed without padding, and all branches have their turn."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny_target import HIDDEN, make_draft
from tests.support.traces import TraceMaker
from torch import Tensor

from updraft_draft.network import DraftNetwork
from updraft_draft.tensors import decoded
from updraft_trainer.data.sample import Counterfactual, Sample, read_sample
from updraft_trainer.data.teacher import LastHidden, Teacher
from updraft_trainer.learning.batch import Batch, Packer, TrainingRows, grouped, packed_rows

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


def packed(samples: Sequence[Sample], *, num_steps: int = 3, turn: int | None = None) -> Batch:
    packer = Packer(num_steps=num_steps, known=KNOWN, turn=turn)
    for sample in samples:
        packer.add(sample)
    batch = packer.batch()
    assert batch is not None
    return batch


@pytest.mark.parametrize("num_steps", [1, 3, 5])
def test_a_branch_has_the_states_that_its_text_alone_has(
    samples: list[Sample], draft: DraftNetwork, num_steps: int
) -> None:
    batch = packed(samples, num_steps=num_steps, turn=1)
    states = draft.unroll_packed(batch.aux.float(), batch.layout)
    branches = [(sample, one) for sample in samples for one in sample.counterfactuals]
    compared = set()
    for j, state in enumerate(states):
        for row, index in counted(batch.discarded, j):
            (sample, one), n = _owner(branches, hidden(batch.discarded)[row])
            aux = decoded([sample.aux[: one.start], one.aux]).float()[None]
            ids = torch.cat([sample.ids[1 : one.start], one.ids, torch.zeros(num_steps, dtype=torch.long)])[None]
            alone = draft.unroll(aux, ids, num_steps=num_steps)[j][0, one.start + n - 1 - j]
            torch.testing.assert_close(state[index], alone, rtol=1e-4, atol=1e-5)
            compared.add((j, n))
    assert compared == {(j, n) for j in range(num_steps) for n in range(2)}


def counted(rows: TrainingRows, step: int) -> list[tuple[int, int]]:
    """The rows that count at a step, and the indices of their states."""
    indices, counts = (field.tolist() for field in rows.of_step(step))
    return [(row, index) for row, (index, count) in enumerate(zip(indices, counts, strict=True)) if count]


def test_a_step_that_would_begin_before_its_text_counts_nothing() -> None:
    rows = TrainingRows((), torch.tensor([4, 5, 9]), torch.tensor([4, 4, 8]), torch.tensor([1.0, 2.0, 3.0]))
    assert [counted(rows, step) for step in range(3)] == [[(0, 4), (1, 5), (2, 9)], [(1, 4), (2, 8)], []]
    assert [rows.weight_of_step(step) for step in range(3)] == [6.0, 5.0, 0.0]
    assert rows.of_step(2)[0].tolist() == [4, 4, 8], "indices stay in the text"


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
    plain, grown = packed(samples), packed(samples, turn=0)
    assert len(grown.discarded) > 0
    assert len(plain.discarded) == 0
    alone = draft.unroll_packed(plain.aux.float(), plain.layout)
    beside = draft.unroll_packed(grown.aux.float(), grown.layout)
    for j, (one, other) in enumerate(zip(alone, beside, strict=True)):
        after, before = (torch.tensor(counted(batch.text, j))[:, 1] for batch in (grown, plain))
        torch.testing.assert_close(other[after], one[before], rtol=1e-4, atol=1e-5)


def test_nothing_is_padded_and_only_rows_that_are_trained_are_unrolled(samples: list[Sample]) -> None:
    batch = packed(samples)
    assert len(batch.aux) == len(batch.layout.ids) == sum(sample.num_rows - 1 for sample in samples)
    for sample, span in zip(samples, batch.layout.spans, strict=True):
        assert span.context_end == span.first
        assert span.first - span.context == max(0, sample.first_output - 1 - 3)
    trained = {index for j in range(3) for _, index in counted(batch.text, j)}
    assert len(trained) == batch.layout.num_unrolled


def test_a_step_takes_branches_of_about_half_the_texts_rows_and_all_have_their_turn(samples: list[Sample]) -> None:
    sample, teachers = samples[1], set[tuple[float, ...]]()
    for turn in range(len(sample.counterfactuals)):
        batch = packed([sample], turn=turn)
        assert len(batch.aux) <= 1.5 * sample.num_rows + 4
        assert len(batch.aux) == packed_rows(sample, 3, turn)
        teachers.update(tuple(row) for row in hidden(batch.discarded).tolist())
    assert teachers == {tuple(row) for one in sample.counterfactuals for row in hidden(one).tolist()}


def test_a_sample_without_a_token_of_the_draft_takes_no_place(samples: list[Sample]) -> None:
    packer = Packer(num_steps=3, known=torch.zeros_like(KNOWN))
    packer.add(samples[0])
    assert packer.batch() is None


def test_corrections_and_samples_have_their_weights(samples: list[Sample]) -> None:
    packer = Packer(num_steps=3, known=KNOWN, correction_weight=0.5)
    packer.add(samples[0], 2.0)
    batch = packer.batch()
    assert batch is not None
    tokens, _ = samples[0].trainable(KNOWN)
    assert batch.text.weights.tolist() == [2.0 * (1.5 if one else 1.0) for one in samples[0].corrections[tokens]]


@given(sizes=st.lists(st.integers(1, 50), max_size=20), budget=st.integers(1, 60))
def test_groups_hold_each_sample_once_within_the_budget_and_are_as_full_as_it_goes(
    sizes: list[int], budget: int
) -> None:
    groups = grouped(sizes, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    totals = [sum(sizes[index] for index in group) for group in groups]
    assert all(total <= budget or len(group) == 1 for total, group in zip(totals, groups, strict=True))
    assert all(one + other > budget for n, one in enumerate(totals) for other in totals[n + 1 :])


def test_training_rows_are_split_in_order_and_without_loss(samples: list[Sample]) -> None:
    rows = packed(samples).text
    parts = list(rows.split(5))
    assert [len(part) for part in parts[:-1]] == [5] * (len(parts) - 1)
    again = TrainingRows.joined(parts)
    assert torch.equal(hidden(again), hidden(rows))
    for field in ("state", "first", "weights"):
        assert torch.equal(getattr(again, field), getattr(rows, field))
