"""Rows carry their position in prompt ++ output, so that a wrong slice is seen."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.support.requests import ended, step

from updraft.trace.v1 import trace_pb2
from updraft_artifacts.sizing import CapturedTraffic, DraftSizes, UsualTarget, sizing
from updraft_draft import tensors
from updraft_inference.agent.chunks import Chunk, RowBytes, chunks, most_context_rows
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.agent.trace import Ended, Origin, row_bytes, trace
from updraft_inference.engine import (
    CaptureParams,
    Counterfactual,
    FinishedRequest,
    HiddenStates,
    Teacher,
    TopK,
    VerifyStep,
)

ENCODE = partial(tensors.encode, encoding=trace_pb2.TENSOR_ENCODING_FP32)
AUX, HIDDEN, TOP_K = 12, 4, 3
ORIGIN = Origin(speculator="s", pod="p", engine="e", target_fingerprint="t", tokenizer_fingerprint="k")
PLAN = CapturePlan(trace_id=b"0123456789abcdef", is_captured=True)


def positions(first: int, count: int, width: int) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(-1, width)


def teacher(first: int, count: int, *, is_top_k: bool) -> Teacher:
    rows = positions(first, count, TOP_K)
    return (
        TopK(ids=rows.long(), log_probs=-rows, log_sum_exp=rows[:, 0]) if is_top_k else positions(first, count, HIDDEN)
    )


@st.composite
def requests(draw: st.DrawFn) -> FinishedRequest:
    """Verify steps of any lengths; rows from some position of the prompt on, some lost; rows after some rejections."""
    num_prompt, prompt_rows = draw(st.integers(1, 30)), draw(st.integers(0, 20))
    steps, num_output, rejected = list[VerifyStep](), 1, []
    for accepted in draw(st.lists(st.integers(0, 2), max_size=60)):
        if accepted < 2 and draw(st.booleans()):
            rejected.append((len(steps), num_output + accepted))
        steps.append(step(num_output, accepted))
        num_output += accepted + 1
    first = max(0, num_prompt - max(1, prompt_rows))
    count = num_prompt + num_output - 1 - first
    is_top_k, first_teacher = draw(st.booleans()), draw(st.integers(0, num_prompt - 1 - first))
    hidden = HiddenStates(
        first_position=first,
        aux=positions(first, count, AUX),
        teacher=teacher(first + first_teacher, count - first_teacher, is_top_k=is_top_k),
        first_teacher_row=first_teacher,
        missing_rows=tuple(sorted(draw(st.sets(st.integers(0, count - 1), max_size=3)))),
        counterfactuals=tuple(
            Counterfactual(step=n, aux=positions(at, 1, AUX), teacher=teacher(at, 1, is_top_k=is_top_k))
            for n, at in rejected
        ),
    )
    finished = ended(*steps, num_output=num_output)
    request = replace(
        finished.request,
        prompt_ids=tuple(range(1000, 1000 + num_prompt)),
        capture=CaptureParams(payload=True, prompt_rows=prompt_rows),
    )
    return replace(finished, request=request, output_ids=tuple(range(2000, 2000 + num_output)), hidden=hidden)


def split(finished: FinishedRequest, max_bytes: int) -> list[Chunk]:
    return list(chunks(finished, row_bytes(finished, ENCODE), max_bytes=max_bytes))


@settings(max_examples=50, deadline=None)
@given(finished=requests(), max_bytes=st.sampled_from([700, 2000, 10**6]), share=st.floats(0, 1))
def test_each_chunk_tells_how_many_of_its_own_first_tokens_were_cached(
    finished: FinishedRequest, max_bytes: int, share: float
) -> None:
    num_cached = int(share * len(finished.request.prompt_ids))
    for part in split(replace(finished, num_cached=num_cached), max_bytes):
        assert part.finished.num_cached == max(0, num_cached - position(part, finished))


@settings(max_examples=150, deadline=None)
@given(finished=requests(), max_bytes=st.sampled_from([700, 2000, 6000, 10**6]))
def test_chunks_have_each_token_step_and_row_once_and_where_it_was(finished: FinishedRequest, max_bytes: int) -> None:
    parts = split(finished, max_bytes)
    ids, missing = finished.request.prompt_ids + finished.output_ids, set()
    assert finished.hidden is not None
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert together(parts) == finished.output_ids
    taught, rejected, steps = list[int](), list[int](), list[VerifyStep]()
    for part in parts:
        one, hidden = part.finished, part.finished.hidden
        own = one.request.prompt_ids + one.output_ids
        assert own == ids[position(part, finished) :][: len(own)]
        steps += [replace(step, start=step.start + part.start) for step in one.steps]
        if hidden is None:
            continue
        start = position(part, finished) + hidden.first_position
        assert hidden.aux[:].equal(positions(start, len(hidden.aux), AUX))
        assert start + len(hidden.aux) == position(part, finished) + len(own) - 1, "a row for each token but the last"
        missing |= {start + row for row in hidden.missing_rows}
        first_taught = len(one.request.prompt_ids) - 1 - hidden.first_position
        expected = teacher(
            start + hidden.first_teacher_row,
            len(hidden.aux) - hidden.first_teacher_row,
            is_top_k=isinstance(hidden.teacher, TopK),
        )
        assert numbers(hidden.teacher).equal(numbers(expected))
        assert len(parts) == 1 or hidden.first_teacher_row >= first_taught, "context has no teacher"
        taught += range(start + first_taught, start + len(hidden.aux))
        for rows in hidden.counterfactuals:
            token = len(one.request.prompt_ids) + one.steps[rows.step].start + one.steps[rows.step].accepted
            rejected.append(position(part, finished) + token - len(finished.request.prompt_ids))
            assert int(rows.aux[0, 0]) == rejected[-1]
    first = len(finished.request.prompt_ids) - 1
    assert tuple(steps) == finished.steps
    assert taught == list(range(first, len(ids) - 1))
    assert rejected == [int(rows.aux[0, 0]) for rows in finished.hidden.counterfactuals]
    lost = {finished.hidden.first_position + row for row in finished.hidden.missing_rows}
    assert {row for row in lost if row >= first} <= missing <= lost


def together(parts: list[Chunk]) -> tuple[int, ...]:
    """The output of all chunks, each of which is named by where its own begins."""
    output: tuple[int, ...] = ()
    for part in parts:
        assert part.start == len(output)
        output += part.finished.output_ids
    return output


def position(part: Chunk, finished: FinishedRequest) -> int:
    """The chunk's first token, in prompt ++ output of the request."""
    return len(finished.request.prompt_ids) + part.start - len(part.finished.request.prompt_ids)


def numbers(rows: Teacher) -> torch.Tensor:
    return rows.ids if isinstance(rows, TopK) else rows


@settings(max_examples=100, deadline=None)
@given(finished=requests(), max_bytes=st.sampled_from([2000, 6000]))
def test_a_chunk_has_at_most_the_bytes_that_it_may_have(finished: FinishedRequest, max_bytes: int) -> None:
    for part in split(finished, max_bytes):
        message = trace(Ended(finished=finished, plan=PLAN, finished_s=0.0), ORIGIN, ENCODE, part)
        message.ClearField("header")
        assert message.ByteSize() <= 1.05 * max_bytes


@given(finished=requests(), max_bytes=st.sampled_from([1200, 2000]))
def test_a_prompt_with_no_more_rows_than_fit_is_sent_whole_and_counts_once(
    finished: FinishedRequest, max_bytes: int
) -> None:
    num_bytes = row_bytes(finished, ENCODE).total
    hidden = finished.hidden
    assert hidden is not None
    prompt_rows = len(finished.request.prompt_ids) - hidden.first_position
    assume(prompt_rows <= most_context_rows(num_bytes, max_bytes=max_bytes))
    assert sum(chunk.num_new_rows for chunk in split(finished, max_bytes)) == finished.num_rows


@pytest.mark.parametrize("num_output", [1, 400])
def test_a_request_without_hidden_states_is_split_by_its_tokens(num_output: int) -> None:
    parts = split(ended(num_output=num_output), 1000)
    assert len(parts) == -(-num_output // 15)
    assert sum(len(part.finished.output_ids) for part in parts) == num_output


@pytest.mark.parametrize("hidden_size", [576, 2048, 4096, 7168])
@pytest.mark.parametrize("num_output", [100, 1_000, 20_000])
def test_the_size_of_a_captured_request_that_volumes_are_planned_for_is_that_of_its_chunks(
    hidden_size: int, num_output: int
) -> None:
    num_prompt, one = 600, torch.zeros(1, 1)
    rows = 512 + num_output - 1
    finished = ended(*(step(start, 0) for start in range(1, num_output)), num_output=num_output)
    finished = replace(
        finished,
        request=replace(finished.request, prompt_ids=(1,) * num_prompt, capture=CaptureParams(prompt_rows=512)),
        hidden=HiddenStates(first_position=num_prompt - 512, aux=one.expand(rows, 1), teacher=one.expand(rows, 1)),
    )
    row = RowBytes(aux=3 * hidden_size + 4, teacher=433)
    kept = [hidden for chunk in chunks(finished, row) if (hidden := chunk.finished.hidden) is not None]
    num_bytes = sum(row.aux * len(hidden.aux) + row.teacher * len(hidden.teacher) for hidden in kept)

    target = UsualTarget(hidden_size=hidden_size)
    traffic = CapturedTraffic(engine="sglang", answer_tokens=num_output)
    computed = sizing(target, DraftSizes.of(target), traffic).captured_request.amount
    assert computed == pytest.approx(num_bytes, rel=0.03)
