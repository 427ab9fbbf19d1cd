"""Splits a finished request into chunks that fit into a stream entry. Pure.

A reader takes a chunk for a whole request: the tokens that it keeps as context are its prompt, the tokens that it teaches are
its output, and its hidden states begin with the context's. The outputs of all chunks add up to the output, and each verify step
is in one chunk. So a lost chunk costs only its own tokens.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from updraft_inference.engine import FinishedRequest, HiddenStates

MAX_CHUNK_BYTES = 4 * 1024 * 1024

ENTRY_SHARE = 0.5
"""Maximum size of a chunk as a share of the limit of a stream entry: sizes are estimates."""

CONTEXT_SHARE = 0.5
"""Maximum share of the first chunk for rows of the prompt, which teach nothing themselves."""

OVERLAP_SHARE = 0.125
"""Maximum share of a later chunk for rows that are also in the chunk before. Such a row costs as much as one that teaches."""

MIN_CONTEXT_ROWS = 8
"""Also without prompt rows: what draft steps unroll over."""

_ID_BYTES = 4

LIGHT_BYTES_PER_TOKEN = 64
"""Approximate bytes per token without hidden states: ids, steps, log-probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBytes:
    """Encoded bytes of a row: of its hidden states, and of its teacher."""

    aux: float
    teacher: float

    @property
    def total(self) -> float:
        return self.aux + self.teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """`start`: the request's output tokens before those of the chunk, which name it."""

    finished: FinishedRequest
    start: int = 0
    is_last: bool = True

    @property
    def has_payload(self) -> bool:
        return self.finished.hidden is not None

    @property
    def num_new_rows(self) -> int:
        """Rows that are not in the chunk before too."""
        return self.finished.num_rows - (self.finished.num_context_rows if self.start else 0)

    @property
    def lighter(self) -> "Chunk | None":
        """The same without counterfactual rows, else without hidden states; None if it has neither."""
        hidden = self.finished.hidden
        if hidden is None:
            return None
        rest = replace(hidden, counterfactuals=()) if hidden.counterfactuals else None
        return replace(self, finished=replace(self.finished, hidden=rest))


def chunk_bytes(max_entry_bytes: int) -> int:
    """The size of chunks for a stream with this limit of an entry."""
    return min(MAX_CHUNK_BYTES, int(ENTRY_SHARE * max_entry_bytes))


def most_context_rows(row_bytes: float, *, max_bytes: int = MAX_CHUNK_BYTES) -> int:
    """Rows of a prompt that fit into a chunk beside what it teaches; more are not worth capturing."""
    return max(MIN_CONTEXT_ROWS, int(CONTEXT_SHARE * max_bytes / row_bytes))


def chunks(finished: FinishedRequest, row_bytes: RowBytes, *, max_bytes: int = MAX_CHUNK_BYTES) -> Iterator[Chunk]:
    """The chunks of a request. One that fits is one chunk."""
    split = _Split(finished, row_bytes, max_bytes)
    start, num_output = 0, len(finished.output_ids)
    for end in split.ends():
        is_whole = (start, end) == (0, num_output) and split.fits
        part = finished if is_whole else split.part(start, end)
        yield Chunk(finished=part, start=start, is_last=end == num_output)
        start = end


class _Split:
    """Positions are those in prompt ++ output, `start` and `end` count output tokens."""

    def __init__(self, finished: FinishedRequest, row_bytes: RowBytes, max_bytes: int) -> None:
        self._finished = finished
        self._row_bytes = row_bytes
        self._max_bytes = max_bytes
        self._num_prompt = len(finished.request.prompt_ids)
        self._costs = np.concatenate([[0.0], _token_bytes(finished, row_bytes).cumsum()])
        self._cuts = sorted({step.start for step in finished.steps} | {len(finished.output_ids)})

    @property
    def fits(self) -> bool:
        """The whole request is one chunk, with all rows of its prompt."""
        prompt = self._prompt_bytes + self._row_bytes.total * self._num_rows_before(0)
        return prompt + float(self._costs[-1]) <= self._max_bytes

    def ends(self) -> list[int]:
        """Where chunks end: before a verify step where there is one, so that no step is in two."""
        start, num_output = 0, len(self._finished.output_ids)
        if self.fits:
            return [num_output]
        ends = []
        while start < num_output:
            most = max(start + 1, self._most(start))
            cut = bisect_right(self._cuts, most) - 1
            start = self._cuts[cut] if cut >= 0 and self._cuts[cut] > start else most
            ends.append(start)
        return ends

    def part(self, start: int, end: int) -> FinishedRequest:
        """Output tokens from `start` to `end` as a request of its own."""
        whole, first = self._finished, self._num_prompt + start
        position = max(0, first - 1 - self._num_context(start)) if start else 0
        steps = [n for n, step in enumerate(whole.steps) if start <= step.start < end]
        ids = whole.request.prompt_ids + whole.output_ids
        return replace(
            whole,
            request=replace(whole.request, prompt_ids=ids[position:first]),
            output_ids=whole.output_ids[start:end],
            num_cached=max(0, whole.num_cached - position),
            steps=tuple(replace(whole.steps[n], start=whole.steps[n].start - start) for n in steps),
            hidden=self._hidden(start, end, position, steps),
        )

    def _most(self, start: int) -> int:
        """The end of the longest chunk from `start` on."""
        room = self._max_bytes - self._row_bytes.aux * self._num_context(start)
        if start == 0:
            room -= self._prompt_bytes
        return int(np.searchsorted(self._costs, self._costs[start] + room, side="right")) - 1

    @property
    def _prompt_bytes(self) -> int:
        return _ID_BYTES * self._num_prompt

    def _num_rows_before(self, start: int) -> int:
        """Rows before the one that teaches output token `start`."""
        hidden = self._finished.hidden
        return 0 if hidden is None else max(0, self._num_prompt + start - 1 - hidden.first_position)

    def _num_context(self, start: int) -> int:
        if self._finished.hidden is None:
            return 0
        share = OVERLAP_SHARE if start else CONTEXT_SHARE
        fitting = max(MIN_CONTEXT_ROWS, int(share * self._max_bytes / self._row_bytes.aux))
        wanted = max(MIN_CONTEXT_ROWS, self._finished.request.capture.prompt_rows)
        return min(self._num_rows_before(start), wanted, fitting)

    def _hidden(self, start: int, end: int, position: int, steps: list[int]) -> HiddenStates | None:
        """Rows of the context and of the tokens, which alone have a teacher; None if none has."""
        hidden = self._finished.hidden
        if hidden is None:
            return None
        taught = self._num_prompt + start - 1 - hidden.first_position  # rows are counted from the first one that exists
        first, stop = max(0, taught - self._num_context(start)), self._num_prompt + end - 1 - hidden.first_position
        taught = max(first, taught, hidden.first_teacher_row)
        if taught >= min(stop, len(hidden.aux)):
            return None
        return HiddenStates(
            first_position=hidden.first_position + first - position,
            aux=hidden.aux[first:stop],
            teacher=hidden.teacher[taught - hidden.first_teacher_row : stop - hidden.first_teacher_row],
            first_teacher_row=taught - first,
            missing_rows=tuple(row - first for row in hidden.missing_rows if first <= row < stop),
            counterfactuals=tuple(
                replace(rows, step=rows.step - steps[0])
                for rows in hidden.counterfactuals
                if steps and steps[0] <= rows.step <= steps[-1]
            ),
        )


def _token_bytes(finished: FinishedRequest, row_bytes: RowBytes) -> npt.NDArray[np.float64]:
    """Approximate bytes that each output token adds to a chunk."""
    num_bytes = np.full(len(finished.output_ids), float(LIGHT_BYTES_PER_TOKEN))
    if finished.hidden is not None:
        num_bytes += row_bytes.total
        for rows in finished.hidden.counterfactuals:
            start = finished.steps[rows.step].start
            num_bytes[min(start, len(num_bytes) - 1)] += row_bytes.total * len(rows.aux)
    return num_bytes
