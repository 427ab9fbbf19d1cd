from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from updraft_tap import prefills
from updraft_tap.policy import CapturedRequests, CaptureOptions
from updraft_tap.prefills import PromptChunk, Span

VOCAB, TOP_K = 11, 3


class Text:
    """A request that is forwarded in chunks. A row's state holds its request's number and its position."""

    def __init__(self, number: int, prompt: int, output: int, cached: int, options: CaptureOptions | None) -> None:
        self.number, self.prompt, self.total, self.cached, self.options = (
            number,
            prompt,
            prompt + output,
            cached,
            options,
        )
        self.done = cached

    def next_part(self, size: int) -> PromptChunk:
        start, self.done = self.done, min(self.total, self.done + size)
        return PromptChunk(
            start=start,
            end=self.done,
            prompt_tokens=self.prompt,
            total_tokens=self.total,
            is_first=start == self.cached,
        )

    def states(self, part: PromptChunk) -> list[tuple[int, int]]:
        return [(self.number, position) for position in range(part.start, part.end)]


def captured_spans(captured: CapturedRequests, parts: list[PromptChunk]) -> tuple[Span, ...]:
    """Of a forward over these chunks of all requests, each of which has a row of logits."""
    first_rows = list(accumulate((part.end - part.start for part in parts), initial=0))
    return prefills.captured_spans(captured, dict(enumerate(parts)), first_rows, range(len(parts)))


texts = st.builds(
    lambda prompt, output, cached, options: (prompt, output, min(cached, prompt + output - 1), options),
    st.integers(1, 12),
    st.integers(0, 4),
    st.integers(0, 12),
    st.one_of(st.none(), st.builds(CaptureOptions, payload=st.booleans(), prompt_rows=st.integers(0, 14))),
)


@given(drawn=st.lists(texts, min_size=1, max_size=4), size=st.integers(1, 9))
def test_all_chunks_together_give_each_wanted_row_once_at_its_position(drawn: list[Any], size: int) -> None:
    everyone = [Text(i, *one) for i, one in enumerate(drawn)]
    rows: dict[int, dict[int, Tensor]] = {text.number: {} for text in everyone}
    teachers: dict[int, list[int]] = {text.number: [] for text in everyone}
    cached: dict[int, int] = {}
    while running := [text for text in everyone if text.done < text.total]:
        parts = [text.next_part(size) for text in running]
        header, tensors = forward(running, parts)
        at = 0
        for request in header["requests"]:
            number = int(request["rid"])
            cached[number] = cached.get(number, 0) + request["cached"]
            for position in range(request["position"], request["position"] + request["rows"]):
                assert position not in rows[number]
                rows[number][position] = tensors["aux"][at]
                at += 1
            teachers[number] += [request["position"] + request["rows"] - 1] * request["teacher_rows"]
        assert at == len(tensors["aux"])

    for text in everyone:
        if text.options is None or not text.options.payload:
            assert rows[text.number] == {}
            continue
        first = max(text.cached, text.prompt - text.options.prompt_rows)
        assert sorted(rows[text.number]) == list(range(first, text.total))
        assert all(state.tolist() == [text.number, position] for position, state in rows[text.number].items())
        assert teachers[text.number] == ([text.total - 1] if first < text.total else [])
        assert cached[text.number] == text.cached


def forward(running: list[Text], parts: list[PromptChunk]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    places = [i for i, text in enumerate(running) if text.options is not None]
    captured = CapturedRequests(
        batch_size=len(running),
        places=tuple(places),
        rids=tuple(str(running[i].number) for i in places),
        options=tuple(options for text in running if (options := text.options) is not None),
    )
    spans = captured_spans(captured, parts)
    states = [state for text, part in zip(running, parts, strict=True) for state in text.states(part)]
    aux = torch.tensor(states)
    logits = torch.randn(len(running), VOCAB, generator=torch.Generator().manual_seed(len(states)))
    expected = [logits[span.logit_row].log_softmax(-1).topk(TOP_K) for span in spans if span.teacher_rows]
    taken = prefills.collect_prefill_rows(spans, logits_BV=logits, states=(aux,), top_k=TOP_K)
    aux.fill_(-1)
    logits[:] = logits.softmax(-1)  # as SGLang's sampler does
    assert taken["ids"].tolist() == [best.indices.tolist() for best in expected]
    assert torch.allclose(
        taken["log_probs"], torch.stack([best.values for best in expected]) if expected else taken["log_probs"]
    )
    return prefills.header(spans), taken


def test_without_prompt_rows_only_the_output_of_a_preempted_request_is_sent_again() -> None:
    captured = CapturedRequests(batch_size=1, places=(0,), rids=("a",), options=(CaptureOptions(payload=True),))
    part = PromptChunk(start=2, end=9, prompt_tokens=6, total_tokens=9, is_first=True)

    (span,) = captured_spans(captured, [part])

    assert span.header == {"rid": "a", "probability": 0.0, "position": 6, "cached": 2, "rows": 3, "teacher_rows": 1}
    assert span.first_row == 4


def test_a_forward_that_does_not_fit_its_states_is_refused() -> None:
    captured = CapturedRequests(
        batch_size=1, places=(0,), rids=("a",), options=(CaptureOptions(payload=True, prompt_rows=9),)
    )
    spans = captured_spans(captured, [PromptChunk(start=0, end=9, prompt_tokens=9, total_tokens=9, is_first=True)])

    with pytest.raises(ValueError, match="do not fit"):
        prefills.collect_prefill_rows(spans, logits_BV=torch.zeros(1, VOCAB), states=(torch.zeros(8, 2),), top_k=TOP_K)
