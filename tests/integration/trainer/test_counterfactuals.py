"""Rows after rejections from the engine that kept them to the learner that they teach, over the wire between them."""

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import DRAFT_VOCAB, make_draft, save_draft
from tests.support.traces import TraceMaker, trace_id
from torch import Tensor

from updraft.trace.v1 import trace_pb2
from updraft_draft import tensors
from updraft_draft.target_weights import read_head
from updraft_inference.agent.selection import CaptureRates, plan
from updraft_inference.agent.trace import Ended, Origin, trace
from updraft_inference.engine import DraftCheckpoint, Drafter, FinishedRequest, GenerationRequest, SamplingParams, TopK
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.learning.learner import Hyperparameters, Learner

RATES = CaptureRates(evaluation_fraction=0, prompt_rows=4, counterfactual_rows=2)


async def served(target: Path, folder: Path, count: int) -> list[FinishedRequest]:
    """Requests to a pod whose draft is untrained, so that it is rejected often."""
    digest = save_draft(make_draft(target, seed=1), folder)
    limits = Limits(num_slots=4, max_context=64, max_lookahead=3)
    finished: list[FinishedRequest] = []
    async with TorchEngine.open(target, EngineOptions(limits=limits, dtype=torch.float32), finished.append) as engine:
        await engine.swap(DraftCheckpoint(version=1, folder=folder, tensors_digest=digest))

        async def ask(n: int) -> None:
            request = GenerationRequest(
                request_id=str(n),
                prompt_ids=tuple(range(3 + n, 12 + n)),
                max_tokens=24,
                sampling=SamplingParams(temperature=0),
                ignore_eos=True,
                drafter=Drafter.EAGLE3,
                lookahead=3,
                capture=plan(RATES, trace_id(n)).params,
            )
            async for _ in engine.generate(request):
                pass

        await asyncio.gather(*(ask(n) for n in range(count)))
    return finished


def sent(finished: FinishedRequest, traces: TraceMaker, encoding: trace_pb2.TensorEncoding.ValueType) -> bytes:
    """The entry in the stream."""
    origin = Origin(
        speculator="default",
        pod="p",
        engine="torch",
        target_fingerprint=traces.target_fingerprint,
        tokenizer_fingerprint=traces.tokenizer_fingerprint,
    )
    ended = Ended(
        finished=finished, plan=plan(RATES, trace_id(int(finished.request.request_id))), finished_s=1_700_000_000.0
    )
    return trace(ended, origin, partial(tensors.encode, encoding=encoding)).SerializeToString()


def learner(target: Path, *, discard_weight: float) -> Learner:
    head = read_head(target)
    config = head.draft(draft_vocab_size=DRAFT_VOCAB)
    hyper = Hyperparameters(learning_rate=3e-3, discard_weight=discard_weight)
    return Learner(head, config, torch.arange(DRAFT_VOCAB), hyper)


def in_their_text(finished: FinishedRequest, sample: Sample) -> bool:
    """Every branch stands where its step rejected: after the same tokens, before another one."""
    steps = [step for step in finished.steps if step.accepted < len(step.draft_ids)]
    everything = (*finished.request.prompt_ids, *finished.output_ids)
    first = len(finished.request.prompt_ids) - sample.first_output
    return len(steps) == len(sample.counterfactuals) and all(
        first + one.start == len(finished.request.prompt_ids) + step.start + step.accepted
        and one.ids.tolist() == list(step.draft_ids[step.accepted :][:2])
        and one.ids[0] != everything[first + one.start]
        for one, step in zip(sample.counterfactuals, steps, strict=True)
    )


def shown(hidden: Tensor, head: Tensor) -> TopK:
    """What an engine that shows no hidden state would say of these rows."""
    logits = (hidden @ head.T).float()
    log_sum_exp = logits.logsumexp(-1)
    likeliest = (logits - log_sum_exp[:, None]).topk(16)
    return TopK(ids=likeliest.indices, log_probs=likeliest.values, log_sum_exp=log_sum_exp)


def of_another_engine(finished: FinishedRequest, head: Tensor) -> FinishedRequest:
    """The same request from an engine that shows logits of what it samples, a prompt whose beginning it had, and no log q."""
    hidden, steps = finished.hidden, [replace(step, draft_log_probs=()) for step in finished.steps]
    assert hidden is not None
    assert isinstance(hidden.teacher, Tensor)
    first = len(finished.request.prompt_ids) - 1 - hidden.first_position
    branches = [replace(one, teacher=shown(one.teacher, head)) for one in hidden.counterfactuals]  # type: ignore[arg-type] # this engine shows states
    changed = replace(
        hidden,
        teacher=shown(hidden.teacher[first:], head),
        first_teacher_row=first,
        missing_rows=(0,),
        counterfactuals=tuple(branches),
    )
    return replace(finished, hidden=changed, steps=tuple(steps))


async def test_what_an_engine_without_last_hidden_states_kept_is_learnt_by_the_trainer(
    tiny_target: Path, traces: TraceMaker, tmp_path: Path
) -> None:
    head = read_head(tiny_target).head.float()
    finished = [of_another_engine(one, head) for one in await served(tiny_target, tmp_path / "draft", 4)]
    entries = [sent(one, traces, trace_pb2.TENSOR_ENCODING_FP8_E4M3) for one in finished]
    samples = [read_sample(one, traces.expected) for one in entries]
    assert all(in_their_text(one, sample) for one, sample in zip(finished, samples, strict=True))
    assert [(sample.first_output, sample.first_teacher_row) for sample in samples] == [(3, 2)] * 4

    weighted = learner(tiny_target, discard_weight=1.0)
    first = weighted.train(samples)
    for _ in range(14):
        last = weighted.train(samples)
        assert not last.is_skipped
    assert last.loss < first.loss


@pytest.mark.parametrize("encoding", [trace_pb2.TENSOR_ENCODING_BF16, trace_pb2.TENSOR_ENCODING_FP8_E4M3])
async def test_what_a_pod_kept_after_rejections_is_learnt_by_the_trainer(
    tiny_target: Path, traces: TraceMaker, tmp_path: Path, encoding: trace_pb2.TensorEncoding.ValueType
) -> None:
    finished = await served(tiny_target, tmp_path / "draft", 4)
    samples = [read_sample(sent(one, traces, encoding), traces.expected) for one in finished]
    assert all(in_their_text(one, sample) for one, sample in zip(finished, samples, strict=True))

    weighted, plain = learner(tiny_target, discard_weight=1.0), learner(tiny_target, discard_weight=0.0)
    first, without = weighted.train(samples), plain.train(samples)
    assert first.loss > without.loss
    assert first.num_rows > without.num_rows
    for _ in range(14):
        last = weighted.train(samples)
        assert not last.is_skipped
    assert last.loss < first.loss
