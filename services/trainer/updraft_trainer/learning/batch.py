"""Packed training batches: texts one after another, their counterfactual branches, and the rows to train on.

Texts are packed into one sequence, so that none is padded, and each row attends to its own text only (see `Layout`). Rows
before the first one that is trained are context: they have keys and values, and nothing else is computed for them.

A branch is a text that the target did not generate: a sample's tokens up to a rejection, then the rejected draft tokens. It
is trained on like any other text: draft steps start from the target's states, also those after rejected tokens, and read the
branch's tokens. A branch repeats the last rows of its text before the rejection, because draft steps from them lead into it.
It shares the earlier rows by tree attention (Miao et al. 2023, arXiv 2305.09781). Rejected: a sequence per branch, which
gives the same values but computes the text again for each.

Tensors: N packed rows, U unrolled rows, J steps, A auxiliary width, D hidden.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from updraft_draft.layout import Layout, Span
from updraft_draft.tensors import EncodedRows, decoded
from updraft_trainer.data.sample import Counterfactual, Sample
from updraft_trainer.data.teacher import DraftVocabulary, Teacher, joined


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Rows with a prediction of the target: teachers of as many rows together; the other fields have one value a row.

    Step j is trained on a row at index `state - j` (int64) of the unrolled states, unless that is before `first` (int64), where
    the row's text begins. `weights` float32: what each row counts.
    """

    teachers: tuple[Teacher, ...]
    state: Tensor
    first: Tensor
    weights: Tensor

    @classmethod
    def joined(cls, parts: Sequence["TrainingRows"]) -> "TrainingRows":
        """All rows, in order."""
        return cls(
            joined([teacher for part in parts for teacher in part.teachers]),
            torch.cat([torch.empty(0, dtype=torch.long), *(part.state for part in parts)]),
            torch.cat([torch.empty(0, dtype=torch.long), *(part.first for part in parts)]),
            torch.cat([torch.empty(0), *(part.weights for part in parts)]),
        )

    def __len__(self) -> int:
        return len(self.state)

    def split(self, num_rows: int) -> Iterator["TrainingRows"]:
        """The same rows in order, at most `num_rows` at a time, each part with one teacher."""
        end = 0
        for teacher in self.teachers:
            for first in range(0, len(teacher), num_rows):
                part = teacher.at(slice(first, first + num_rows))
                start, end = end, end + len(part)
                yield TrainingRows((part,), *(field[start:end] for field in (self.state, self.first, self.weights)))

    def logits(self, vocabulary: DraftVocabulary) -> Tensor:
        """The target's predictions over the draft vocabulary, not normalised: [rows, V]."""
        logits = [teacher.logits(vocabulary) for teacher in self.teachers]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def of_step(self, step: int) -> tuple[Tensor, Tensor]:
        """For each row, the index of its state of this step, and what it counts there: nothing if the state would be before
        its text, where the text's first state stands in. To leave such rows out, a GPU would have to be asked for their
        number."""
        index = self.state - step
        return index.maximum(self.first), self.weights * (index >= self.first)

    def weight_of_step(self, step: int) -> float:
        return float(self.of_step(step)[1].sum())

    def to(self, device: torch.device) -> "TrainingRows":
        teachers = tuple(teacher.to(device) for teacher in self.teachers)
        fields = (field.to(device, non_blocking=True) for field in (self.state, self.first, self.weights))
        return TrainingRows(teachers, *fields)


@dataclass(frozen=True, slots=True)
class Batch:
    """`aux` [N, A] of the layout's rows. `discarded`: rows of the branches, after rejected draft tokens."""

    aux: Tensor
    layout: Layout
    text: TrainingRows
    discarded: TrainingRows

    def to(self, device: torch.device) -> "Batch":
        aux = self.aux.to(device, non_blocking=True)
        return Batch(aux, self.layout.to(device), self.text.to(device), self.discarded.to(device))


class Packer:
    """A batch that samples are added to, one after another."""

    def __init__(
        self, *, num_steps: int, known: Tensor, correction_weight: float = 0.0, turn: int | None = None
    ) -> None:
        """`known` bool [vocab] marks tokens that the draft can propose; others are not trained. A row whose token replaced a
        rejected draft token counts 1 + `correction_weight`. `turn` selects some branches of each sample; None: none."""
        self._num_steps = num_steps
        self._known = known
        self._correction_weight = correction_weight
        self._turn = turn
        self._aux, self._ids, self._positions = list[EncodedRows](), list[Tensor](), list[Tensor]()
        self._spans = list[Span]()
        self._texts, self._discarded = list[TrainingRows](), list[TrainingRows]()
        self._num_rows = self._num_unrolled = 0

    def add(self, sample: Sample, weight: float = 1.0) -> None:
        """Pack a sample, of which each row counts `weight`; nothing if no row of it can be trained."""
        tokens, teacher = sample.trainable(self._known)
        branches = () if self._turn is None else selected(sample, self._num_steps, self._turn)
        cuts = [cut for one in branches if len((cut := _branch(sample, one, self._num_steps, self._known)).state)]
        if not len(tokens) and not cuts:
            return
        start = self._append([sample.aux[:-1]], _following(sample.ids[1:], sample.num_rows - 1, self._num_steps))
        if len(tokens):
            first, end = max(0, int(tokens[0]) - 1 - self._num_steps), int(tokens[-1]) - 1
            counts = weight * (1.0 + self._correction_weight * sample.corrections[tokens].float())
            self._texts.append(self._training_rows(teacher, tokens - 2 - first, counts))
            self._unroll(Span(start + first, start + end, start, start + first))
        for cut in cuts:
            self._add_branch(cut, start, weight)

    def batch(self) -> "Batch | None":
        """All that was added; None if nothing was."""
        if not self._spans:
            return None
        positions = torch.cat(self._positions)
        layout = Layout(torch.cat(self._ids), positions, tuple(self._spans), int(positions.max()) + 1 + self._num_steps)
        text, discarded = TrainingRows.joined(self._texts), TrainingRows.joined(self._discarded)
        return Batch(decoded(self._aux), layout, text, discarded)

    def _add_branch(self, cut: "_Branch", text_start: int, weight: float) -> None:
        """It sees the text before its first row, then itself, causally."""
        start = self._append(cut.aux, cut.ids, cut.first)
        counts = torch.full((len(cut.state),), weight)
        self._discarded.append(self._training_rows(cut.teacher, cut.state, counts))
        self._unroll(Span(start, self._num_rows, text_start, text_start + cut.first))

    def _append(self, aux: Sequence[EncodedRows], ids: Tensor, first_position: int = 0) -> int:
        """Add rows; return the index of the first one."""
        start = self._num_rows
        self._aux.extend(aux)
        self._ids.append(ids)
        self._positions.append(torch.arange(first_position, first_position + len(ids)))
        self._num_rows += len(ids)
        return start

    def _unroll(self, span: Span) -> None:
        self._spans.append(span)
        self._num_unrolled += len(span)

    def _training_rows(self, teacher: Teacher, state: Tensor, weights: Tensor) -> TrainingRows:
        """Rows of the span that comes next; `state` is relative to it."""
        first = torch.full_like(state, self._num_unrolled)
        return TrainingRows((teacher,), state + first, first, weights)


def selected(sample: Sample, num_steps: int, turn: int) -> tuple[Counterfactual, ...]:
    """Counterfactuals with about half as many rows as the text. Consecutive turns select all of them."""
    counterfactuals = sample.counterfactuals
    num_rows = sum(num_steps - 1 + len(one.ids) for one in counterfactuals)
    stride = max(1, min(len(counterfactuals), math.ceil(2 * num_rows / sample.num_rows)))
    return counterfactuals[turn % stride :: stride]


def packed_rows(sample: Sample, num_steps: int, turn: int | None) -> int:
    """Rows that a sample is packed into, at most."""
    branches = () if turn is None else selected(sample, num_steps, turn)
    return sample.num_rows - 1 + sum(num_steps - 1 + len(one.ids) for one in branches)


def grouped(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in groups whose sizes add up to at most `budget`, the largest first; what is larger is a group of its own."""
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        fitting = next((n for n, left in enumerate(room) if sizes[index] <= left), None)
        if fitting is None:
            groups.append([index])
            room.append(budget - sizes[index])
        else:
            groups[fitting].append(index)
            room[fitting] -= sizes[index]
    return groups


def step_weights(batches: Sequence[Batch], num_steps: int) -> Tensor:
    """The sum of the weights of the rows that each step is trained on, of texts and of branches: float64 [2, J]."""
    kinds = [batch.text for batch in batches], [batch.discarded for batch in batches]
    sums = [[math.fsum(rows.weight_of_step(j) for rows in kind) for j in range(num_steps)] for kind in kinds]
    return torch.tensor(sums, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class _Branch:
    """Rows of a branch, from row `first` of its text on: aux [rows, A] in parts, ids [rows, J]. `state`: those with a
    teacher."""

    first: int
    aux: Sequence[EncodedRows]
    ids: Tensor
    teacher: Teacher
    state: Tensor


def _branch(sample: Sample, one: Counterfactual, num_steps: int, known: Tensor) -> _Branch:
    """Rows of a branch have no next token to check, so those are trained whose teacher predicts a token of the draft's."""
    # The first row whose last step predicts what follows the rejected draft token.
    first = max(0, one.start - num_steps)
    aux = (sample.aux[first : one.start], one.aux[:-1])
    num_rows = sum(map(len, aux))
    is_trainable = one.teacher.is_trainable(known)
    return _Branch(
        first=first,
        aux=aux,
        ids=_following(torch.cat([sample.ids[first + 1 : one.start], one.ids]), num_rows, num_steps),
        teacher=one.teacher.at(is_trainable),
        state=torch.arange(num_rows - len(one.teacher), num_rows)[is_trainable],
    )


def _following(ids: Tensor, num_rows: int, num_steps: int) -> Tensor:
    """The tokens after each row, int64 [rows, J], where `ids` are those after the first row. After the end there are zeros."""
    padded = torch.cat([ids, ids.new_zeros(num_steps - 1)])
    return padded[: num_rows + num_steps - 1].unfold(0, num_steps, 1)
