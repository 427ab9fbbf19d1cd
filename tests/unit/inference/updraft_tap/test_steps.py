from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from updraft_tap import steps
from updraft_tap.distribution import chosen
from updraft_tap.policy import CapturedRequests, CaptureOptions

VOCAB, AUX, TOP_K = 13, 4, 5

options = st.one_of(
    st.none(),
    st.builds(CaptureOptions, payload=st.booleans(), prompt_rows=st.just(0), counterfactual_rows=st.integers(0, 6)),
)


def interest_of(each: list[CaptureOptions | None]) -> CapturedRequests:
    places = [i for i, options in enumerate(each) if options is not None]
    return CapturedRequests(
        batch_size=len(each),
        places=tuple(places),
        rids=tuple(f"request {i}" for i in places),
        options=tuple(options for options in each if options is not None),
    )


class Block:
    """A verify step of a batch, and the plain way to say what each of its rows is."""

    def __init__(self, batch_size: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        g = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(VOCAB, (batch_size, width), generator=g)
        self.seq_lens = torch.randint(1, 100, (batch_size,), generator=g)
        self.accept_lens = torch.randint(1, width + 1, (batch_size,), generator=g, dtype=torch.int32)
        self.logits = torch.randn(batch_size * width, VOCAB, generator=g)
        self.aux = torch.randn(batch_size * width, AUX, generator=g).to(dtype)

    def captured(self, captured: CapturedRequests) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As the hooks do it: look, then SGLang overwrites all that it showed."""
        shown = [self.tokens.clone(), self.seq_lens.clone(), self.logits.clone(), self.aux.clone()]
        tokens, seq_lens, logits, aux = shown
        rows = steps.even_rows(captured, tokens.shape[1])
        taken = steps.collect_step_rows(
            rows,
            tokens_M=tokens.flatten(),
            positions_S=chosen(seq_lens, captured.places),
            logits_NV=logits,
            states=(aux,),
            top_k=TOP_K,
        )
        for tensor in shown:
            tensor.fill_(0)
        accept_lens = chosen(self.accept_lens, captured.places).clone()
        message = steps.StepMessage(rows=rows, versions=(7,) * len(captured.places))
        return message.message({**taken, "accept_lens": accept_lens}, 1500)


@given(each=st.lists(options, min_size=1, max_size=5), width=st.integers(1, 5), seed=st.integers(0, 1000))
def test_each_row_is_of_its_request_and_its_position(each: list[CaptureOptions | None], width: int, seed: int) -> None:
    captured = interest_of(each)
    block = Block(len(each), width, seed)

    header, tensors = block.captured(captured)

    log_p = block.logits.log_softmax(-1)
    assert [request["rid"] for request in header["requests"]] == [f"request {i}" for i in captured.places]
    at = 0
    for place, options, request in zip(captured.places, captured.options, header["requests"], strict=True):
        accepted, rows = request["accepted"], range(place * width, (place + 1) * width)
        drafts = block.tokens[place, 1:]
        assert (request["position"], accepted) == (block.seq_lens[place], block.accept_lens[place] - 1)
        assert request["drafts"] == drafts.tolist()
        assert request["log_p"] == pytest.approx(
            [float(log_p[r, d]) for r, d in zip(rows, drafts, strict=False)], abs=1e-5
        )
        rejected = width - 1 - accepted
        assert request["rows"] == (accepted + 1 if options.payload else 0)
        assert request["counterfactual_rows"] == (min(options.counterfactual_rows, rejected) if options.payload else 0)
        for row in rows[: request["rows"] + request["counterfactual_rows"]]:
            assert torch.equal(tensors["aux"][at], block.aux[row])
            best = block.logits[row].topk(TOP_K)
            assert torch.equal(tensors["ids"][at], best.indices.int())
            assert torch.allclose(tensors["log_probs"][at], log_p[row, best.indices], atol=1e-5)
            assert torch.allclose(tensors["log_sum_exp"][at], block.logits[row].logsumexp(-1), atol=1e-5)
            at += 1
    assert all(len(tensor) == at for tensor in tensors.values())


def test_the_header_says_whose_step_it_was() -> None:
    header, tensors = Block(3, 4, 0).captured(interest_of([None, CaptureOptions(), None]))

    assert [request["version"] for request in header["requests"]] == [7]
    assert {name: header[name] for name in ("kind", "batch_size", "duration_us")} == {
        "kind": "steps",
        "batch_size": 3,
        "duration_us": 1500,
    }
    assert tensors == {}


def test_a_step_without_drafts_has_a_row_and_nothing_accepted() -> None:
    header, tensors = Block(1, 1, 0).captured(interest_of([CaptureOptions(payload=True, counterfactual_rows=3)]))

    (request,) = header["requests"]
    assert (request["accepted"], request["drafts"], request["log_p"]) == (0, [], [])
    assert (request["rows"], request["counterfactual_rows"], len(tensors["aux"])) == (1, 0, 1)


def test_states_keep_their_dtype_and_the_teacher_is_exact() -> None:
    _, tensors = Block(2, 3, 0, torch.bfloat16).captured(interest_of([CaptureOptions(payload=True), None]))

    assert [tensors[name].dtype for name in ("aux", "ids", "log_probs", "log_sum_exp")] == [
        torch.bfloat16,
        torch.int32,
        torch.float32,
        torch.float32,
    ]


def test_a_batch_that_does_not_fit_its_logits_is_refused() -> None:
    block = Block(2, 3, 0)
    block.logits = block.logits[:5]

    with pytest.raises(ValueError, match="do not fit"):
        block.captured(interest_of([CaptureOptions(), CaptureOptions()]))


def test_absurd_acceptance_is_refused() -> None:
    block = Block(1, 3, 0)
    block.accept_lens[0] = 4

    with pytest.raises(ValueError, match="3 of 2 draft tokens were accepted"):
        block.captured(interest_of([CaptureOptions()]))
