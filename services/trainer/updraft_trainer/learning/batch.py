"""Training batches: padded texts, their counterfactual branches, and the rows to train on.

A branch is a text that the target did not generate: a sample's tokens up to a rejection, then the rejected draft tokens. It
is trained on like any other text: draft steps start from the target's states, also those after rejected tokens, and read the
branch's tokens. A branch repeats the last rows of its text before the rejection, because draft steps from them lead into it.
It shares the earlier rows by tree attention (Miao et al. 2023, arXiv 2305.09781). Rejected: a sequence per branch, which
gives the same values but computes the text again for each.

Tensors: B samples, T rows of the longest text, M rows of the most branches, J steps, A auxiliary width, D hidden.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from updraft_draft.network import Tree
from updraft_trainer.data.sample import Counterfactual, Sample
from updraft_trainer.data.teacher import DraftVocabulary, Teacher, joined


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """N rows with a prediction of the target: teachers of N rows together; the other fields are int64 [N].

    `corrections` bool [N] marks rows whose token replaced a rejected draft token. Step j is trained on a row at column
    `column - j` of the unrolled states of `sample`, unless that column is before `first`.
    """

    teachers: tuple[Teacher, ...]
    sample: Tensor
    column: Tensor
    first: Tensor
    corrections: Tensor

    @classmethod
    def joined(cls, parts: Sequence["TrainingRows"]) -> "TrainingRows":
        """All rows, in order."""
        return cls(
            joined([teacher for part in parts for teacher in part.teachers]),
            torch.cat([part.sample for part in parts]),
            torch.cat([part.column for part in parts]),
            torch.cat([part.first for part in parts]),
            torch.cat([part.corrections for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.sample)

    def split(self, num_rows: int) -> Iterator["TrainingRows"]:
        """The same rows in order, at most `num_rows` at a time, each part with one teacher."""
        end = 0
        for teacher in self.teachers:
            for first in range(0, len(teacher), num_rows):
                part = teacher.at(slice(first, first + num_rows))
                start, end = end, end + len(part)
                rest = (field[start:end] for field in (self.sample, self.column, self.first, self.corrections))
                yield TrainingRows((part,), *rest)

    def log_p(self, vocabulary: DraftVocabulary) -> Tensor:
        """The target's predictions over the draft vocabulary: float32 [N, V]."""
        return torch.cat([teacher.log_p(vocabulary) for teacher in self.teachers])

    def of_step(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that a step is trained on: sample and column of their states, and their indices in these rows."""
        indices = torch.nonzero(self.column - step >= self.first)[:, 0]
        return self.sample[indices], self.column[indices] - step, indices


@dataclass(frozen=True, slots=True)
class Batch:
    """`aux` [B, T + M, A] and the tree of its rows, which are unrolled from `first_row` on. `weights` float32 [B]: what each
    sample counts."""

    aux: Tensor
    tree: Tree
    first_row: int
    text: TrainingRows
    weights: Tensor
    discarded: TrainingRows | None = None
    """Rows of the branches, after rejected draft tokens; None without branches."""

    @classmethod
    def of(
        cls, samples: Sequence[Sample], *, num_steps: int, known: Tensor, weights: Sequence[float] | None = None
    ) -> "Batch":
        """A batch without branches. `known` bool [vocab] marks tokens that the draft can propose; others are not trained.
        Without `weights` samples count alike."""
        T = max(s.num_rows for s in samples) - 1
        aux = torch.zeros(len(samples), T, samples[0].aux.shape[1], dtype=samples[0].aux.dtype)
        ids = torch.zeros(len(samples), T + num_steps - 1, dtype=torch.long)
        first_row = max(0, min(s.first_output for s in samples) - 1 - num_steps)
        rows = []
        for b, sample in enumerate(samples):
            aux[b, : sample.num_rows - 1] = sample.aux[:-1]
            following = sample.ids[1 : 1 + ids.shape[1]]
            ids[b, : len(following)] = following
            tokens, teacher = sample.trainable(known)
            column = tokens - 2 - first_row
            states = (torch.full_like(column, b), column, torch.zeros_like(column))
            rows.append(TrainingRows((teacher,), *states, sample.corrections[tokens]))
        counts = torch.ones(len(samples)) if weights is None else torch.tensor(weights)
        return cls(aux, Tree.chain(ids, num_steps), first_row, TrainingRows.joined(rows), counts)

    def with_branches(self, samples: Sequence[Sample], *, turn: int, known: Tensor) -> "Batch":
        """The batch with some branches of each sample; `turn` selects which. Rows of a branch have no next token to check, so a
        row is trained if the teacher predicts any token that the draft can propose."""
        T, num_steps = self.aux.shape[1], self.tree.ids.shape[-1]
        branches = [[_branch(s, one, num_steps) for one in _selected(s, num_steps, turn)] for s in samples]
        M = max(sum(len(branch.aux) for branch in of_sample) for of_sample in branches)
        if M == 0:
            return self
        aux, tree = F.pad(self.aux, (0, 0, 0, M)), _with_rows(self.tree, len(samples), M)
        rows = []
        for b, of_sample in enumerate(branches):
            end = T
            for branch in of_sample:
                start, end = end, end + len(branch.aux)
                aux[b, start:end] = branch.aux
                branch.insert(tree, b, start)
                rows.append(branch.training_rows(b, start - self.first_row, known))
        return replace(self, aux=aux, tree=tree, discarded=TrainingRows.joined(rows))


@dataclass(frozen=True, slots=True)
class _Branch:
    """Rows of a branch from row `first` of its text on: aux [rows, A], ids [rows, J]. The last rows have a teacher."""

    first: int
    aux: Tensor
    ids: Tensor
    teacher: Teacher

    def insert(self, tree: Tree, sample: int, start: int) -> None:
        """Write the branch into the tree's rows from `start` on. It sees the text before `first`, then itself, causally."""
        end = start + len(self.aux)
        tree.ids[sample, start:end] = self.ids
        tree.positions[sample, start:end] = torch.arange(self.first, self.first + len(self.aux))
        tree.visible[sample, start:end, : self.first] = True
        tree.visible[sample, start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()

    def training_rows(self, sample: int, start: int, known: Tensor) -> TrainingRows:
        """The branch's rows to train on. `start`: the column of its first row in the unrolled states."""
        is_trainable = self.teacher.is_trainable(known)
        column = torch.arange(len(self.aux) - len(self.teacher), len(self.aux))[is_trainable] + start
        states = (torch.full_like(column, sample), column, torch.full_like(column, start))
        return TrainingRows((self.teacher.at(is_trainable),), *states, torch.zeros_like(column, dtype=torch.bool))


def _branch(sample: Sample, one: Counterfactual, num_steps: int) -> _Branch:
    # The first row whose last step predicts what follows the rejected draft token.
    first = max(0, one.start - num_steps)
    ids = torch.cat([sample.ids[first + 1 : one.start], one.ids, one.ids.new_zeros(num_steps - 1)])
    return _Branch(
        first=first,
        aux=torch.cat([sample.aux[first : one.start], one.aux[:-1]]),
        ids=ids.unfold(0, num_steps, 1),
        teacher=one.teacher,
    )


def _selected(sample: Sample, num_steps: int, turn: int) -> tuple[Counterfactual, ...]:
    """Counterfactuals with about half as many rows as the text, which makes a step about 50 % slower. Consecutive turns
    select all of them."""
    counterfactuals = sample.counterfactuals
    num_rows = sum(num_steps - 1 + len(one.ids) for one in counterfactuals)
    stride = max(1, min(len(counterfactuals), math.ceil(2 * num_rows / sample.num_rows)))
    return counterfactuals[turn % stride :: stride]


def _with_rows(tree: Tree, num_samples: int, num_rows: int) -> Tree:
    """The tree with additional rows for each sample, each of which sees only itself."""
    ids, positions, visible = (field.expand(num_samples, *field.shape[1:]) for field in tree)
    rest = torch.eye(visible.shape[1] + num_rows, dtype=torch.bool)
    return Tree(
        F.pad(ids, (0, 0, 0, num_rows)),
        F.pad(positions, (0, num_rows)),
        F.pad(visible, (0, num_rows, 0, num_rows)) | rest,
    )
