"""Assembles the messages of the plugin about one request, at its end or part by part. Pure.

Rows are placed by position in prompt ++ output, so a lost message leaves a hole and shifts nothing. A preempted request is
computed again: rows that are already known are not replaced, and steps whose tokens the server discarded are removed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from updraft_inference.engine import CaptureParams, Counterfactual, Drafter, HiddenStates, TopK, VerifyStep


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

    def since(self, position: int) -> "Rows | None":
        """Rows from a position on, in memory of their own; None without any."""
        if self.end <= position:
            return None
        skipped = max(0, position - self.position)
        if not skipped:
            return self
        untaught = len(self.aux) - len(self.teacher)
        teacher = self.teacher[max(0, skipped - untaught) :]
        return Rows(
            position=self.position + skipped,
            aux=self.aux[skipped:].clone(),
            teacher=TopK(
                ids=teacher.ids.clone(), log_probs=teacher.log_probs.clone(), log_sum_exp=teacher.log_sum_exp.clone()
            ),
        )


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


KEPT_BYTES = 1 << 20
"""Size of the rows that stay after they were handed over: the next chunk repeats them as context."""

_MARGIN_TOKENS = 16
"""The newest tokens stay: a preempted request may lose the last step's and generate them again."""


class TraceBuilder:
    """Collects the parts of a request as they arrive, for its steps and hidden states at the end.

    Those of a long request can be taken while it runs; their rows are forgotten then, and the end has the others. The work per
    message and per part does not grow with the request.
    """

    def __init__(self, num_prompt: int, params: CaptureParams, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._num_prompt = num_prompt
        self._kept_bytes = kept_bytes
        self._params = params
        self._taken: list[VerifyStep] = []
        """Steps whose rows were taken."""
        self._context: list[Rows] = []
        """The last rows of those, which the next part needs."""
        self._steps: list[StepPart] = []
        self._prefilled: list[Rows] = []
        self._again_to = 0
        """The position after a repeated forward over the output, until the next step arrives."""
        self._reached = num_prompt if params.payload else num_prompt + 1
        self._first = max(0, num_prompt - params.prompt_rows)
        """The first position whose row is wanted."""
        self.nbytes = 0
        self.num_taken = 0
        """Output tokens whose rows were taken."""

    def add_step(self, step: StepPart) -> None:
        """Add a verify step. An impossible one is ignored, and one of tokens that were taken."""
        first = self._num_prompt + max(0, self.num_taken - 1)
        if step.position < first or not 0 <= step.accepted <= len(step.draft_ids):
            return
        self._forget_from(step.position - 1 if self._again_to else step.position)
        self._again_to = 0
        self._steps.append(step)
        self.nbytes += step.nbytes
        self._reached = step.position + step.accepted + 2

    def add_rows(self, rows: Rows) -> None:
        """Add the rows of a forward over the prompt, or over prompt and output of a preempted request."""
        if kept := rows.since(self._first):
            self._prefilled.append(kept)
            self.nbytes += kept.nbytes
        if rows.end > self._num_prompt:
            self._again_to = max(self._again_to, rows.end)
        self._reached = max(self._reached, rows.end + 1)

    def covers(self, num_output: int) -> bool:
        """Whether the last part of `num_output` tokens has arrived; parts arrive in order."""
        return self._reached >= self._num_prompt + num_output

    def take(self, num_output: int) -> "Assembly | None":
        """The first `num_taken` output tokens with the rows that were not taken before, all that can be had of `num_output`
        tokens; None if nothing is to be had now."""
        settled = self._kept(num_output - _MARGIN_TOKENS)
        if self._again_to or not settled or self._start(settled[-1]) <= self.num_taken:
            return None
        self.num_taken = self._start(settled[-1])
        assembly = self.assembly(self.num_taken)
        self._forget_taken()
        return assembly

    def assembly(self, num_output: int) -> "Assembly":
        """The first `num_output` tokens, as they are known now, with the rows that were not taken and their context."""
        kept = self._kept(num_output)
        return Assembly(
            num_prompt=self._num_prompt,
            num_output=num_output,
            params=self._params,
            first=self._first,
            taken=tuple(self._taken),
            kept=tuple(kept),
            pieces=(*self._context, *(step.rows for step in kept if step.rows is not None), *self._prefilled),
        )

    def _kept(self, num_output: int) -> list[StepPart]:
        end = self._num_prompt + num_output
        if self._again_to:
            end = min(end, self._again_to)
        return [step for step in self._steps if step.position + 1 < end]

    def _forget_from(self, position: int) -> None:
        """Remove steps that gave a token after `position`, because it was discarded and is generated again."""
        while self._steps and self._steps[-1].position + self._steps[-1].accepted + 1 > position:
            self.nbytes -= self._steps.pop().nbytes

    def _start(self, step: StepPart) -> int:
        """The first output token that a step gave."""
        return step.position - self._num_prompt + 1

    def _forget_taken(self) -> None:
        """Drop rows before the context of the first token that was not taken. Steps before it change no more."""
        end = self._num_prompt + self.num_taken - 1
        row_bytes = max((rows.nbytes // len(rows.aux) for rows in self._rows() if len(rows.aux)), default=1)
        self._first = max(self._first, end - self._kept_bytes // row_bytes)
        self._prefilled = [kept for rows in self._prefilled if (kept := rows.since(self._first))]
        taken = [step for step in self._steps if step.position < end]
        self._steps = self._steps[len(taken) :]
        self._taken += (_verify_step(step, self._num_prompt) for step in taken)
        rows = [*self._context, *(step.rows for step in taken if step.rows is not None)]
        self._context = [kept for piece in rows if (kept := piece.since(self._first))]
        self.nbytes = sum(rows.nbytes for rows in (*self._context, *self._prefilled))
        self.nbytes += sum(step.nbytes for step in self._steps)

    def _rows(self) -> list[Rows]:
        return [*self._context, *(step.rows for step in self._steps if step.rows is not None), *self._prefilled]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """The pieces of some output tokens. Putting them together copies all rows, which takes long enough to need a thread; the
    pieces never change."""

    num_prompt: int
    num_output: int
    params: CaptureParams
    first: int
    """The first position whose row is wanted."""
    taken: tuple[VerifyStep, ...]
    kept: tuple[StepPart, ...]
    pieces: tuple[Rows, ...]
    """Where two have a row of the same position, the earlier piece counts."""

    def steps(self) -> tuple[VerifyStep, ...]:
        """The captured steps that gave the output tokens."""
        return (*self.taken, *(_verify_step(step, self.num_prompt) for step in self.kept))

    def hidden(self) -> HiddenStates | None:
        """The rows that read prompt ++ output except its last token, from the context of what was not taken on; None without
        any row with a teacher."""
        if not self.params.payload:
            return None
        end = self.num_prompt + self.num_output - 1
        present = [piece for piece in self.pieces if piece.position < end and piece.end > self.first and len(piece.aux)]
        like = next((piece for piece in present if len(piece.teacher)), None)
        if like is None:
            return None
        canvas = _Canvas(max(self.first, min(piece.position for piece in present)), end, like)
        for piece in present:
            canvas.paint(piece)
        return canvas.hidden(tuple(self._counterfactuals()))

    def _counterfactuals(self) -> Iterator[Counterfactual]:
        """Rows of the steps whose rejected draft token stood before the end."""
        for index, step in enumerate(self.kept, start=len(self.taken)):
            rejected, limit = step.rejected, self.params.counterfactual_rows
            start = step.position - self.num_prompt + 1
            if rejected is None or not limit or not len(rejected.aux) or start + step.accepted >= self.num_output:
                continue
            yield Counterfactual(step=index, aux=rejected.aux[:limit], teacher=rejected.teacher[:limit])


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


class _Canvas:
    """Positions `first` to `end`, each filled once."""

    def __init__(self, first: int, end: int, like: Rows) -> None:
        num, k = end - first, like.teacher.ids.shape[1]
        self._first, self._end = first, end
        self._aux = torch.zeros(num, like.aux.shape[1], dtype=like.aux.dtype)
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
        self._aux[there][is_new] = rows.aux[start - rows.position : stop - rows.position][is_new]
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
