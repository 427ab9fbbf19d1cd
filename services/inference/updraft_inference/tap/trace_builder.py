"""Assembles the messages of the plugin about one request. Pure.

Rows are placed by position in prompt ++ output, so a lost message leaves a hole and shifts nothing. A preempted request is
computed again: rows that are already known are not replaced, and steps whose tokens the server discarded are removed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from updraft_inference.engine import Counterfactual, Drafter, HiddenStates, TopK, VerifyStep

_FIRST_BLOCK_BYTES, _BLOCK_BYTES = 1 << 14, 1 << 20
"""The size of a request's first block, and that up to which each is twice as large as the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Hidden states of consecutive positions, [rows, A], with the teacher of the last `len(teacher)` of them."""

    position: int
    aux: Tensor
    teacher: TopK

    @property
    def end(self) -> int:
        return self.position + len(self.aux)

    @property
    def nbytes(self) -> int:
        return self.aux.nbytes + self.teacher.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPart:
    """One request's part of a verify step. Its first row, if it has any, read the token at `position`."""

    position: int
    accepted: int
    draft_ids: tuple[int, ...]
    target_log_probs: tuple[float, ...]
    batch_size: int
    duration_s: float
    version: int
    rows: Rows | None = None
    rejected: Rows | None = None
    """Rows that read the rejected draft token and those after it."""

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in (self.rows, self.rejected) if rows is not None)

    @property
    def without_rows(self) -> "StepPart":
        return replace(self, rows=None, rejected=None)


class _Blocks:
    """Memory for tensors [rows, ...] of one form."""

    def __init__(self) -> None:
        self._free: Tensor | None = None
        self._next_bytes = _FIRST_BLOCK_BYTES

    def keep(self, rows: Tensor) -> Tensor:
        """A copy of these rows: here, or on its own if it is large, so that no block is left with much room."""
        if not (num := len(rows)) or rows.nbytes > _BLOCK_BYTES // 4:
            return rows.clone()
        if self._free is None or len(self._free) < num:
            self._free = rows.new_empty(max(num, self._next_bytes * num // max(1, rows.nbytes)), *rows.shape[1:])
            self._next_bytes = min(2 * self._next_bytes, _BLOCK_BYTES)
        kept, self._free = self._free[:num].copy_(rows), self._free[num:]
        return kept


class RowBlocks:
    """Memory for the rows of one request, all of one form. Thousands of small tensors between larger ones that come and go
    would leave gaps of several times their size. Rejected rows may be dropped at the end, so they lie apart."""

    def __init__(self) -> None:
        self._rows, self._rejected = _RowBlocks(), _RowBlocks()

    def keep(self, part: Rows | StepPart) -> Rows | StepPart:
        """The same part with its rows copied here."""
        if isinstance(part, Rows):
            return self._rows.keep(part)
        rows = None if part.rows is None else self._rows.keep(part.rows)
        rejected = None if part.rejected is None else self._rejected.keep(part.rejected)
        return replace(part, rows=rows, rejected=rejected)


class _RowBlocks:
    """Memory for each tensor of rows."""

    def __init__(self) -> None:
        self._aux, self._ids, self._log_probs, self._log_sum_exp = (_Blocks() for _ in range(4))

    def keep(self, rows: Rows) -> Rows:
        teacher = TopK(
            ids=self._ids.keep(rows.teacher.ids),
            log_probs=self._log_probs.keep(rows.teacher.log_probs),
            log_sum_exp=self._log_sum_exp.keep(rows.teacher.log_sum_exp),
        )
        return Rows(position=rows.position, aux=self._aux.keep(rows.aux), teacher=teacher)


class TraceBuilder:
    """Collects the parts of a request as they arrive, for its steps and hidden states at the end.

    The work per message and per part does not grow with the request.
    """

    def __init__(self, num_prompt: int) -> None:
        self._num_prompt = num_prompt
        self._steps: list[StepPart] = []
        self._prefilled: list[Rows] = []
        self._again_to = 0
        """The position after a repeated forward over the output, until the next step arrives."""
        self._reached = num_prompt

    def add_step(self, step: StepPart) -> None:
        """Add a verify step. An impossible one is ignored."""
        if step.position < self._num_prompt or not 0 <= step.accepted <= len(step.draft_ids):
            return
        self._forget_from(step.position - 1 if self._again_to else step.position)
        self._again_to = 0
        self._steps.append(step)
        self._reached = step.position + step.accepted + 2

    def add_rows(self, rows: Rows) -> None:
        """Add the rows of a forward over the prompt, or over prompt and output of a preempted request."""
        self._prefilled.append(rows)
        if rows.end > self._num_prompt:
            self._again_to = max(self._again_to, rows.end)
        self._reached = max(self._reached, rows.end + 1)

    def covers(self, num_output: int) -> bool:
        """Whether the last part of `num_output` tokens has arrived; parts arrive in order."""
        return self._reached >= self._num_prompt + num_output

    def steps(self, num_output: int) -> tuple[VerifyStep, ...]:
        """The captured steps that gave the first `num_output` tokens."""
        return tuple(_verify_step(step, self._num_prompt) for step in self._kept(num_output))

    def hidden(self, num_output: int) -> HiddenStates | None:
        """The rows that read prompt ++ output except its last token; None without any row with a teacher. Copies all teachers,
        which takes long enough to need a thread. Where two parts have a row of the same position, the step's counts."""
        steps, end = self._kept(num_output), self._num_prompt + num_output - 1
        pieces = [*(step.rows for step in steps if step.rows is not None), *self._prefilled]
        present = [piece for piece in pieces if piece.position < end and len(piece.aux)]
        like = next((piece for piece in present if len(piece.teacher)), None)
        if like is None:
            return None
        canvas = _Canvas(min(piece.position for piece in present), end, like)
        for piece in present:
            canvas.paint(piece)
        return canvas.hidden(tuple(self._counterfactuals(steps, num_output)))

    def _kept(self, num_output: int) -> list[StepPart]:
        end = self._num_prompt + num_output
        if self._again_to:
            end = min(end, self._again_to)
        return [step for step in self._steps if step.position + 1 < end]

    def _forget_from(self, position: int) -> None:
        """Remove steps that gave a token after `position`, because it was discarded and is generated again."""
        while self._steps and self._steps[-1].position + self._steps[-1].accepted + 1 > position:
            self._steps.pop()

    def _counterfactuals(self, steps: Sequence[StepPart], num_output: int) -> Iterator[Counterfactual]:
        """Rows of the steps whose rejected draft token stood before the end."""
        for index, step in enumerate(steps):
            rejected, start = step.rejected, step.position - self._num_prompt + 1
            if rejected is not None and len(rejected.aux) and start + step.accepted < num_output:
                yield Counterfactual(step=index, aux=rejected.aux, teacher=rejected.teacher)


def _verify_step(step: StepPart, num_prompt: int) -> VerifyStep:
    has_drafts = bool(step.draft_ids)
    return VerifyStep(
        start=step.position - num_prompt + 1,
        accepted=step.accepted,
        draft_ids=step.draft_ids,
        draft_log_probs=(),
        target_log_probs=step.target_log_probs,
        batch_size=step.batch_size,
        duration_s=step.duration_s,
        drafter=Drafter.EAGLE3 if has_drafts else Drafter.NONE,
        draft_version=step.version if has_drafts else 0,
    )


class PaintedRows:
    """Rows [rows, A] in the pieces that they came in, for a request may have gigabytes of them. A slice copies its own."""

    def __init__(self, num_rows: int, like: Tensor) -> None:
        self._pieces: list[Tensor] = []
        self._piece = torch.full((num_rows,), -1, dtype=torch.int64)
        """The number of each row's piece; -1: it has none and is all zero."""
        self._row = torch.zeros(num_rows, dtype=torch.int64)
        """Its place in that piece."""
        self._empty = like[:0].clone()

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self._pieces)

    def __len__(self) -> int:
        return len(self._piece)

    def paint(self, rows: slice, which: Tensor, piece: Tensor, first: int) -> None:
        """Take those of `rows` that `which` marks from `piece`, where they begin at row `first`."""
        if not bool(which.any()):
            return
        self._piece[rows][which] = len(self._pieces)
        self._row[rows][which] = torch.arange(first, first + len(which))[which]
        self._pieces.append(piece)

    def __getitem__(self, rows: slice, /) -> Tensor:
        piece, row = self._piece[rows], self._row[rows]
        result = self._empty.new_zeros(len(piece), *self._empty.shape[1:])
        edges = [0, *(1 + piece.diff().nonzero().flatten()).tolist(), len(piece)]
        for first, end in pairwise(edges) if len(piece) else ():
            if (number := int(piece[first])) >= 0:
                result[first:end] = self._pieces[number][row[first:end]]
        return result


class _Canvas:
    """Positions `first` to `end`, each filled once."""

    def __init__(self, first: int, end: int, like: Rows) -> None:
        num, k = end - first, like.teacher.ids.shape[1]
        self._first, self._end = first, end
        self._aux = PaintedRows(num, like.aux)
        self._teacher = TopK(
            ids=torch.zeros(num, k, dtype=torch.int64),
            log_probs=torch.zeros(num, k),
            log_sum_exp=torch.zeros(num),
        )
        self._is_seen = torch.zeros(num, dtype=torch.bool)
        self._has_teacher = torch.zeros(num, dtype=torch.bool)

    def paint(self, rows: Rows) -> None:
        """Fill in unknown positions. A teacher that arrives later belongs to the states of its own row."""
        start, stop = max(rows.position, self._first), min(rows.end, self._end)
        there = slice(start - self._first, stop - self._first)
        is_new = ~self._is_seen[there]
        self._aux.paint(there, is_new, rows.aux, start - rows.position)
        self._is_seen[there] = True
        first_teacher_position = rows.end - len(rows.teacher)
        start = max(start, first_teacher_position)
        if start >= stop:
            return
        there = slice(start - self._first, stop - self._first)
        is_new = ~self._has_teacher[there]
        teacher = rows.teacher[start - first_teacher_position : stop - first_teacher_position]
        self._teacher.ids[there][is_new] = teacher.ids[is_new].long()
        self._teacher.log_probs[there][is_new] = teacher.log_probs[is_new]
        self._teacher.log_sum_exp[there][is_new] = teacher.log_sum_exp[is_new]
        self._has_teacher[there] = True

    def hidden(self, counterfactuals: tuple[Counterfactual, ...]) -> HiddenStates:
        """All rows. After the first row with a teacher, rows without one count as missing, because nothing can be
        learned from them."""
        first_teacher = int(self._has_teacher.nonzero()[0]) if bool(self._has_teacher.any()) else len(self._has_teacher)
        exists = self._is_seen.clone()
        exists[first_teacher:] &= self._has_teacher[first_teacher:]
        return HiddenStates(
            first_position=self._first,
            aux=self._aux,
            teacher=self._teacher[first_teacher:],
            first_teacher_row=first_teacher,
            missing_rows=tuple((~exists).nonzero().flatten().tolist()),
            counterfactuals=counterfactuals,
        )
