"""Samples as the tensors of one forward: padded texts, the branches that were discarded there, what is learnt of both.

A branch is text that might have been: a sample's tokens, then a rejected draft and those after it. It is learnt like any
text: draft steps start from the target's states, those after rejected tokens included, and read these tokens. Its first rows
repeat the text's last ones, whence steps lead into it; the rest of the text it shares, by tree attention (Miao et al. 2023,
arXiv 2305.09781). A sequence of its own for each was refused: as exact, but it reads the whole text again.

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
class Lessons:
    """What the target said at N places: teachers of N rows together; the others int64 [N].

    `corrections` bool [N]: the token there replaced a rejected draft.

    Step j says the same in column `column - j` of `sample`'s unrolled states, if that is not before the column `first`.
    """

    teachers: tuple[Teacher, ...]
    sample: Tensor
    column: Tensor
    first: Tensor
    corrections: Tensor

    @classmethod
    def joined(cls, lessons: Sequence["Lessons"]) -> "Lessons":
        """All of them, in order."""
        return cls(
            joined([teacher for one in lessons for teacher in one.teachers]),
            torch.cat([one.sample for one in lessons]),
            torch.cat([one.column for one in lessons]),
            torch.cat([one.first for one in lessons]),
            torch.cat([one.corrections for one in lessons]),
        )

    def __len__(self) -> int:
        return len(self.sample)

    def split(self, num_rows: int) -> Iterator["Lessons"]:
        """The same lessons in order, at most `num_rows` at a time."""
        end = 0
        for teacher in self.teachers:
            for first in range(0, len(teacher), num_rows):
                part = teacher.at(slice(first, first + num_rows))
                start, end = end, end + len(part)
                rest = (field[start:end] for field in (self.sample, self.column, self.first, self.corrections))
                yield Lessons((part,), *rest)

    def log_p(self, vocabulary: DraftVocabulary) -> Tensor:
        """What was said, over the draft vocabulary: float32 [N, V]."""
        return torch.cat([teacher.log_p(vocabulary) for teacher in self.teachers])

    def at(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Those that a step says: sample and column of its state, and their indices here."""
        known = torch.nonzero(self.column - step >= self.first)[:, 0]
        return self.sample[known], self.column[known] - step, known


@dataclass(frozen=True, slots=True)
class Batch:
    """aux [B, T + M, A] and the tree of its rows, unrolled from `first_row` on."""

    aux: Tensor
    tree: Tree
    first_row: int
    text: Lessons
    discarded: Lessons | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample], *, num_steps: int, known: Tensor) -> "Batch":
        """The texts. `known` bool [vocab]: tokens that the draft can propose; others are not learnt."""
        T = max(s.num_rows for s in samples) - 1
        aux = torch.zeros(len(samples), T, samples[0].aux.shape[1], dtype=samples[0].aux.dtype)
        ids = torch.zeros(len(samples), T + num_steps - 1, dtype=torch.long)
        first_row = max(0, min(s.first_output for s in samples) - 1 - num_steps)
        lessons = []
        for b, sample in enumerate(samples):
            rows = sample.num_rows - 1
            aux[b, :rows] = sample.aux[:rows]
            tokens = sample.ids[1 : 1 + ids.shape[1]]
            ids[b, : len(tokens)] = tokens
            learnt, teacher = sample.taught(known)
            column = learnt - 2 - first_row
            places = (torch.full_like(column, b), column, torch.zeros_like(column))
            lessons.append(Lessons((teacher,), *places, sample.corrections[learnt]))
        return cls(aux, Tree.chain(ids, num_steps), first_row, Lessons.joined(lessons))

    def with_branches(self, samples: Sequence[Sample], *, turn: int, known: Tensor) -> "Batch":
        """Also what was discarded in the samples: of each, those branches whose turn it is. No token followed that would
        tell what the draft cannot propose, so a row counts wherever its teacher knows a token that it can."""
        T, num_steps = self.aux.shape[1], self.tree.ids.shape[-1]
        branches = [[_branch(s, one, num_steps) for one in _in_turn(s, num_steps, turn)] for s in samples]
        M = max(sum(len(branch.aux) for branch in of_sample) for of_sample in branches)
        if M == 0:
            return self
        aux, tree = F.pad(self.aux, (0, 0, 0, M)), _grown(self.tree, len(samples), M)
        lessons = []
        for b, of_sample in enumerate(branches):
            end = T
            for branch in of_sample:
                start, end = end, end + len(branch.aux)
                aux[b, start:end] = branch.aux
                branch.enter(tree, b, start)
                lessons.append(branch.lessons(b, start - self.first_row, known))
        return replace(self, aux=aux, tree=tree, discarded=Lessons.joined(lessons))


@dataclass(frozen=True, slots=True)
class _Branch:
    """Rows `first` and on of a text of its own: aux [rows, A], ids [rows, J]; the last of them have a teacher."""

    first: int
    aux: Tensor
    ids: Tensor
    teacher: Teacher

    def enter(self, tree: Tree, sample: int, start: int) -> None:
        """Stand in rows `start` and on of the tree: after the text's rows before `first`, and each after the one before."""
        end = start + len(self.aux)
        tree.ids[sample, start:end] = self.ids
        tree.positions[sample, start:end] = torch.arange(self.first, self.first + len(self.aux))
        tree.visible[sample, start:end, : self.first] = True
        tree.visible[sample, start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()

    def lessons(self, sample: int, start: int, known: Tensor) -> Lessons:
        """For states whose column `start` is this branch's first row."""
        is_lesson = self.teacher.has_lesson(known)
        last = torch.arange(len(self.aux) - len(self.teacher), len(self.aux))[is_lesson] + start
        teacher = self.teacher.at(is_lesson)
        places = (torch.full_like(last, sample), last, torch.full_like(last, start))
        return Lessons((teacher,), *places, torch.zeros_like(last, dtype=torch.bool))


def _branch(sample: Sample, one: Counterfactual, num_steps: int) -> _Branch:
    first = max(0, one.start - num_steps)  # the first row whose last step predicts what follows the rejected draft
    ids = torch.cat([sample.ids[first + 1 : one.start], one.ids, one.ids.new_zeros(num_steps - 1)])
    return _Branch(
        first=first,
        aux=torch.cat([sample.aux[first : one.start], one.aux[:-1]]),
        ids=ids.unfold(0, num_steps, 1),
        teacher=one.teacher,
    )


def _in_turn(sample: Sample, num_steps: int, turn: int) -> tuple[Counterfactual, ...]:
    """Branches of about half as many rows as the text has, for about half the time again; others at other turns."""
    found = sample.counterfactuals
    rows = sum(num_steps - 1 + len(one.ids) for one in found)
    stride = max(1, min(len(found), math.ceil(2 * rows / sample.num_rows)))
    return found[turn % stride :: stride]


def _grown(tree: Tree, num_samples: int, num_rows: int) -> Tree:
    """The tree with further rows for each sample, which see nothing but themselves."""
    ids, positions, visible = (field.expand(num_samples, *field.shape[1:]) for field in tree)
    rest = torch.eye(visible.shape[1] + num_rows, dtype=torch.bool)
    return Tree(
        F.pad(ids, (0, 0, 0, num_rows)),
        F.pad(positions, (0, num_rows)),
        F.pad(visible, (0, num_rows, 0, num_rows)) | rest,
    )
