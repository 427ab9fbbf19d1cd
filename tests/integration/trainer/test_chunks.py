"""Chunks of a long request, from the pod that splits it to the samples that the trainer makes of them."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.requests import step
from tests.support.traces import TraceMaker

from updraft.trace.v1 import trace_pb2
from updraft_draft import tensors
from updraft_inference.agent.chunks import chunks
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.agent.trace import Ended, Origin, row_bytes, trace
from updraft_inference.engine import CaptureParams, FinishedRequest, FinishReason, GenerationRequest, HiddenStates
from updraft_trainer.data.replay import IncomingTrace, Replay
from updraft_trainer.data.retention import Pool, ReplayLimits
from updraft_trainer.data.sample import Sample, read_sample

ENCODE = partial(tensors.encode, encoding=trace_pb2.TENSOR_ENCODING_BF16)
NUM_PROMPT, NUM_OUTPUT, PROMPT_ROWS = 9, 200, 6


def request(traces: TraceMaker) -> FinishedRequest:
    """A request as an engine reports it, with the tokens and the hidden states of a made-up target."""
    one = traces.trace(3, num_prompt=NUM_PROMPT, num_output=NUM_OUTPUT)
    first = NUM_PROMPT - PROMPT_ROWS
    return FinishedRequest(
        request=GenerationRequest(
            request_id="a",
            prompt_ids=tuple(one.prompt_ids),
            max_tokens=NUM_OUTPUT,
            capture=CaptureParams(payload=True, prompt_rows=PROMPT_ROWS),
        ),
        output_ids=tuple(one.output_ids),
        steps=tuple(step(start, 1) for start in range(1, NUM_OUTPUT - 1, 2)),
        reason=FinishReason.LENGTH,
        time_to_first_token_s=0.1,
        duration_s=1.0,
        hidden=HiddenStates(
            first_position=first,
            aux=tensors.decode(one.payload.aux_hidden)[first:],
            teacher=tensors.decode(one.payload.last_hidden)[first:],
        ),
    )


def entries(traces: TraceMaker, *, max_bytes: int, is_evaluation: bool = False) -> list[bytes]:
    """What a pod puts into the stream."""
    plan = CapturePlan(
        trace_id=b"0123456789abcdef", is_captured=True, is_evaluation=is_evaluation, payload_probability=1.0
    )
    origin = Origin(
        speculator="default",
        pod="p",
        engine="torch",
        target_fingerprint=traces.target_fingerprint,
        tokenizer_fingerprint=traces.tokenizer_fingerprint,
    )
    finished = request(traces)
    ended = Ended(finished=finished, plan=plan, finished_s=0.0)
    parts = chunks(finished, row_bytes(finished, ENCODE), max_bytes=max_bytes)
    return [trace(ended, origin, ENCODE, part).SerializeToString() for part in parts]


def incoming(traces: TraceMaker, data: bytes) -> IncomingTrace:
    return IncomingTrace(sample=read_sample(data, traces.expected), data=data)


def lessons(samples: list[Sample], vocab_size: int) -> list[tuple[int, float]]:
    """Tokens that samples teach, each with a number of its teacher."""
    found = []
    for sample in samples:
        tokens, teacher = sample.trainable(torch.ones(vocab_size, dtype=torch.bool))
        states = teacher.states  # type: ignore[union-attr]  # this target shows its last hidden states
        found += list(zip(sample.ids[tokens].tolist(), states.float().sum(-1).tolist(), strict=True))
    return found


@pytest.mark.parametrize("max_bytes", [8_000, 30_000])
def test_chunks_teach_each_token_that_the_whole_request_teaches(traces: TraceMaker, max_bytes: int) -> None:
    (whole,) = entries(traces, max_bytes=10**7)
    parts = entries(traces, max_bytes=max_bytes)
    assert len(parts) > 3
    vocab_size = traces.expected.vocab_size
    taught = lessons([read_sample(part, traces.expected) for part in parts], vocab_size)
    assert taught == lessons([read_sample(whole, traces.expected)], vocab_size)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), is_evaluation=st.booleans())
def test_chunks_that_are_missing_doubled_or_out_of_order_cost_themselves_only(
    *, tmp_path_factory: pytest.TempPathFactory, traces: TraceMaker, data: st.DataObject, is_evaluation: bool
) -> None:
    parts = entries(traces, max_bytes=8_000, is_evaluation=is_evaluation)
    arriving = data.draw(st.lists(st.sampled_from(range(len(parts))), max_size=2 * len(parts)), label="arriving")
    path = tmp_path_factory.mktemp("replay") / "replay"
    admitted: list[Sample] = []
    limits = ReplayLimits.of(1 << 24)
    with Replay.open(path, limits=limits, expected=traces.expected, cache_bytes=0) as replay:
        for number in arriving:
            admitted += replay.admit([incoming(traces, parts[number])])
        pool = Pool.EVALUATION if is_evaluation else Pool.WINDOW
        assert replay.num_samples(pool) == len(set(arriving)) == len(admitted)
        held_out = {sample.trace_id for sample in replay.evaluation_batch(count=100)}
        assert len(held_out) == (is_evaluation and bool(arriving)), "one chunk is the evidence of the request"
        assert held_out <= {sample.trace_id for sample in admitted}
        assert sum(replay.traffic_mix().shares.values()) == bool(arriving)
    wanted = [read_sample(parts[number], traces.expected) for number in sorted(set(arriving))]
    assert sorted(sample.trace_id for sample in wanted) == sorted(sample.trace_id for sample in admitted)
