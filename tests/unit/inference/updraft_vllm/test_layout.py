import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_tap.policy import CaptureOptions
from updraft_vllm.layout import Batch, Scheduled, layout

PAYLOAD = CaptureOptions(payload=True, prompt_rows=1000)


def batch_of(requests: list[Scheduled]) -> Batch:
    return Batch(
        rids=[one.rid for one in requests],
        tokens=[one.tokens for one in requests],
        drafts=[one.drafts for one in requests],
        read=requests.__getitem__,
    )


@st.composite
def batches(draw: st.DrawFn) -> list[Scheduled]:
    batch = []
    for i in range(draw(st.integers(1, 6))):
        prompt, output, drafts = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 3))
        is_decoding, is_again = draw(st.booleans()), draw(st.booleans())
        known = prompt + output if is_decoding or is_again else prompt
        computed = known - 1 if is_decoding else draw(st.integers(0, known - 1 - is_again))
        tokens = 1 + drafts if is_decoding else draw(st.integers(1, known - computed))
        batch.append(
            Scheduled(
                rid=f"r{i}",
                tokens=tokens,
                drafts=drafts if is_decoding else 0,
                computed=computed,
                prompt_tokens=prompt,
                known_tokens=known,
                is_first=draw(st.booleans()),
            )
        )
    return batch


@given(batch=batches(), captured=st.sets(st.integers(0, 5)))
def test_each_captured_request_has_its_own_rows(batch: list[Scheduled], captured: set[int]) -> None:
    options = {one.rid: PAYLOAD for i, one in enumerate(batch) if i in captured}
    states = [(one.rid, one.computed + i) for one in batch for i in range(one.tokens)]
    logits = [(one.rid, one.computed + one.tokens - one.drafts - 1 + i) for one in batch for i in range(one.drafts + 1)]

    found = layout(batch_of(batch), options)

    if not options:
        assert found is None
        return
    assert found is not None
    by_rid = {one.rid: one for one in batch}
    decoding = [one.rid for one in batch if one.rid in options and not one.is_prefill]
    steps = found.steps
    assert [batch[place].rid for place in found.roots] == decoding == list(steps.captured.rids if steps else ())
    for i, rid in enumerate(decoding):
        assert steps is not None
        one = by_rid[rid]
        assert one.computed == one.known_tokens - 1
        expected = [(rid, one.computed + offset) for offset in range(one.drafts + 1)]
        assert [states[steps.state_rows[i] + offset] for offset in range(steps.widths[i])] == expected
        assert [logits[steps.logit_rows[i] + offset] for offset in range(steps.widths[i])] == expected
    assert [span.rid for span in found.spans] == [one.rid for one in batch if one.rid in options and one.is_prefill]
    for span in found.spans:
        one = by_rid[span.rid]
        rows = [states[span.first_row + offset] for offset in range(span.rows)]
        assert rows == [(span.rid, one.computed + offset) for offset in range(one.tokens)]
        assert span.teacher_rows == int(one.computed + one.tokens == one.known_tokens)
        assert logits[span.logit_row] == rows[-1]


def test_what_was_known_before_a_preemption_is_read_like_a_prompt() -> None:
    again = Scheduled(rid="a", tokens=9, drafts=0, computed=5, prompt_tokens=4, known_tokens=14, is_first=True)

    found = layout(batch_of([again]), {"a": CaptureOptions(payload=True, prompt_rows=1)})

    assert found is not None
    assert found.steps is None
    (span,) = found.spans
    assert span.header == {"rid": "a", "probability": 0.0, "position": 5, "cached": 5, "rows": 9, "teacher_rows": 1}


@pytest.mark.parametrize("drafts", [0, 2])
def test_one_token_that_is_read_again_is_no_verify_step(drafts: int) -> None:
    again = Scheduled(rid="a", tokens=1, drafts=0, computed=5, prompt_tokens=4, known_tokens=14, is_first=True)
    decoding = Scheduled(
        rid="b", tokens=1 + drafts, drafts=drafts, computed=13, prompt_tokens=4, known_tokens=14, is_first=False
    )

    found = layout(batch_of([again, decoding]), {"a": PAYLOAD, "b": PAYLOAD})

    assert found is not None
    assert found.steps is not None
    assert found.steps.captured.rids == ("b",)
    assert [span.header for span in found.spans] == [
        {"rid": "a", "probability": 0.0, "position": 5, "cached": 5, "rows": 1, "teacher_rows": 0}
    ]
