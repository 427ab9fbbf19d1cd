"""From a request that an engine reports to a version that a registry accepts, for targets of every family."""

from functools import partial
from pathlib import Path

import pytest
import torch
from tests.support.published_targets import TARGETS, make
from tests.support.requests import step
from tests.support.traces import TraceMaker
from torch import Tensor

from updraft.registry.v1 import registry_pb2
from updraft.trace.v1 import trace_pb2
from updraft_draft import checkpoint, tensors
from updraft_draft.target_weights import TargetHead, read_head
from updraft_inference.agent.chunks import chunks
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.agent.trace import Ended, Origin, row_bytes, trace
from updraft_inference.engine import (
    CaptureParams,
    FinishedRequest,
    FinishReason,
    GenerationRequest,
    HiddenStates,
    Teacher,
    TopK,
)
from updraft_registry.messages.admission import check_manifest
from updraft_trainer.data.replay import IncomingTrace, Replay
from updraft_trainer.data.retention import ReplayLimits
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.estimate import compare, num_tokens, verify_steps
from updraft_trainer.publishing.publish import Candidate, save, snapshot
from updraft_trainer.states.state import Identity

ENCODE = partial(tensors.encode, encoding=trace_pb2.TENSOR_ENCODING_FP8_E4M3)
NUM_PROMPT, NUM_OUTPUT = 6, 40
NUM_TRAINING, NUM_HELD_OUT, NUM_STEPS = 12, 4, 40


def likeliest(target: TargetHead, states: Tensor) -> TopK:
    """The teacher that SGLang sends for rows with these last hidden states."""
    logits = states.float() @ target.head.float().T * target.config.logit_scale
    if (cap := target.config.logit_cap) is not None:
        logits = cap * torch.tanh(logits / cap)
    log_p = logits.log_softmax(-1).topk(64)
    return TopK(ids=log_p.indices, log_probs=log_p.values, log_sum_exp=logits.logsumexp(-1))


def captured(traces: TraceMaker, target: TargetHead, seed: int, *, engine: str, is_held_out: bool) -> list[bytes]:
    """The stream's entries for one request to the engine."""
    one = traces.trace(seed, num_prompt=NUM_PROMPT, num_output=NUM_OUTPUT)
    last = tensors.decode(one.payload.last_hidden)
    teacher: Teacher = last if engine == "torch" else likeliest(target, last)
    finished = FinishedRequest(
        request=GenerationRequest(
            request_id=str(seed),
            prompt_ids=tuple(one.prompt_ids),
            max_tokens=NUM_OUTPUT,
            capture=CaptureParams(payload=True, prompt_rows=NUM_PROMPT),
        ),
        output_ids=tuple(one.output_ids),
        steps=tuple(step(start, 1) for start in range(1, NUM_OUTPUT - 1, 2)),
        reason=FinishReason.LENGTH,
        time_to_first_token_s=0.1,
        duration_s=1.0,
        hidden=HiddenStates(first_position=0, aux=tensors.decode(one.payload.aux_hidden), teacher=teacher),
    )
    plan = CapturePlan(
        trace_id=one.header.trace_id, is_captured=True, is_evaluation=is_held_out, payload_probability=1.0
    )
    origin = Origin(
        speculator="default",
        pod="p",
        engine=engine,
        target_fingerprint=traces.target_fingerprint,
        tokenizer_fingerprint=traces.tokenizer_fingerprint,
    )
    ended = Ended(finished=finished, plan=plan, finished_s=one.header.finished_unix_ms / 1000)
    parts = chunks(finished, row_bytes(finished, ENCODE))
    return [trace(ended, origin, ENCODE, part).SerializeToString() for part in parts]


@pytest.mark.parametrize(
    ("name", "engine"), [*((name, "sglang") for name in TARGETS), ("granite", "torch"), ("gemma 4", "torch")]
)
def test_requests_to_a_target_of_this_family_become_a_better_draft_that_the_registry_accepts(
    name: str, engine: str, tmp_path: Path
) -> None:
    make(name, tmp_path / "target")
    target, traces = read_head(tmp_path / "target"), TraceMaker(tmp_path / "target")
    config = target.draft(draft_vocab_size=128)
    learner = Learner(target, config, torch.arange(128), Hyperparameters(learning_rate=3e-3))
    with Replay.open(
        tmp_path / "replay", limits=ReplayLimits.of(1 << 26), expected=traces.expected, cache_bytes=0
    ) as replay:
        admitted = list[Sample]()
        for seed in range(NUM_TRAINING + NUM_HELD_OUT):
            is_held_out = seed >= NUM_TRAINING
            for data in captured(traces, target, seed, engine=engine, is_held_out=is_held_out):
                admitted += replay.admit([IncomingTrace(sample=read_sample(data, traces.expected), data=data)])
        held_out = [one for one in replay.evaluation_batch(count=NUM_HELD_OUT) if num_tokens(one)]
        assert len(held_out) == NUM_HELD_OUT
        training = [sample for sample in admitted if not sample.is_evaluation]
        first = snapshot(learner.network)
        for at in range(NUM_STEPS):
            assert not learner.train([training[(4 * at + i) % len(training)] for i in range(4)]).is_skipped
        draft = snapshot(learner.network)
        steps, before = (verify_steps(network, held_out, lookahead=3) for network in (draft, first))
        assert sum(steps) < 0.8 * sum(before), "it accepts more than it did"
        estimate = compare(held_out, steps, None, replay.traffic_mix())
    candidate = Candidate(network=draft, step=NUM_STEPS, estimate=estimate, baseline_version=0, lookahead=3)
    identity = Identity(
        speculator="default",
        target_fingerprint=traces.target_fingerprint,
        tokenizer_fingerprint=traces.tokenizer_fingerprint,
    )
    manifest = save(candidate, tmp_path / "draft", identity, registry_pb2.Provenance(step=NUM_STEPS))
    check_manifest(manifest, max_bytes=2**30)
    assert len(manifest.evaluation.samples) == NUM_HELD_OUT
    served, weights = checkpoint.load(tmp_path / "draft")
    assert served == config
    assert weights["lm_head.weight"].shape == (128, config.hidden_size)
