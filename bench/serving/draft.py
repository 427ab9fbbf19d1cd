"""An EAGLE-3 draft for the bench, trained by the project's own learner on answers of the target, once per recipe: from the
closed form on, and averaged, as the trainer publishes it.

Our engine answers the requests to train on; no part of the bench measures these. The folder's name is a digest of everything
that determines its content, and the folder appears only when it is complete.
"""

import asyncio
import hashlib
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.serving import workloads
from bench.serving.plan import SEED, Recipe

from updraft.trace.v1 import trace_pb2
from updraft_artifacts.digests import tensors_digest
from updraft_draft import checkpoint, tensors
from updraft_draft.target_weights import read_head
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.agent.trace import Ended, Origin, trace
from updraft_inference.engine import (
    CaptureParams,
    DraftCheckpoint,
    Drafter,
    FinishedRequest,
    GenerationRequest,
    SamplingParams,
)
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import ExpectedTarget, Sample, read_sample
from updraft_trainer.learning.learner import Hyperparameters, Learner

DRAFT_VOCAB = 8192
BATCH_SAMPLES = 4
MAX_PROMPT_TOKENS = 192
PROMPT_ROWS = 64
STREAMS = 16
_VERSION = 2
"""Raise it when training changes in a way that neither recipe nor prompts show."""

Tell = Callable[[str, int, int], None]
"""The current task, how much of it is done, and out of how much."""


def trained(cache: Path, model: Path, words: workloads.Words, recipe: Recipe, tell: Tell) -> DraftCheckpoint:
    """The draft of a recipe. The first call serves and trains (about 5 minutes for the full recipe on two cores)."""
    prompts = _prompts(words, recipe)
    key = hashlib.sha256(repr((_VERSION, model.name, recipe, DRAFT_VOCAB, sorted(prompts.items()))).encode())
    folder = cache / "bench" / f"draft-{key.hexdigest()[:16]}"
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        _train(model, prompts, recipe, tell, partial)
        partial.rename(folder)
    _, weights = checkpoint.load(folder)
    digest = tensors_digest(checkpoint.tensor_specs(sorted(weights.items())))
    return DraftCheckpoint(version=1, folder=folder, tensors_digest=digest)


def _prompts(words: workloads.Words, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    return {
        f"{domain}-{n:03}": ids[-MAX_PROMPT_TOKENS:]
        for domain in recipe.domains
        for n, ids in enumerate(workloads.prompts(words, domain, recipe.requests, seed=SEED, is_held_out=False))
    }


def _train(model: Path, prompts: dict[str, tuple[int, ...]], recipe: Recipe, tell: Tell, folder: Path) -> None:
    tell(f"serving {len(prompts)} requests to learn from", 0, recipe.steps)
    samples = _samples(model, asyncio.run(_served(model, prompts, tokens=recipe.tokens)))
    target = read_head(model)
    token_ids = choose_vocabulary(samples, target, size=DRAFT_VOCAB)
    config = target.draft(draft_vocab_size=len(token_ids))
    learner, rng = Learner(target, config, token_ids, Hyperparameters(), seed=SEED), random.Random(SEED)
    first = learner.closed_form(samples)
    if first is not None:
        learner.start_from_fit(first)
    for step in range(recipe.steps):
        tell("training a draft", step, recipe.steps)
        learner.train(rng.sample(samples, BATCH_SAMPLES))
    checkpoint.save(learner.average, folder)


def _samples(model: Path, traces: list[trace_pb2.Trace]) -> list[Sample]:
    config, header = read_head(model).config, traces[0].header
    expected = ExpectedTarget(
        target_fingerprint=header.target_fingerprint,
        tokenizer_fingerprint=header.tokenizer_fingerprint,
        aux_size=len(config.aux_layers) * config.hidden_size,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
    )
    return [read_sample(one.SerializeToString(), expected) for one in traces]


async def _served(model: Path, prompts: dict[str, tuple[int, ...]], *, tokens: int) -> list[trace_pb2.Trace]:
    """Traces of greedy answers, in the order of the requests' names."""
    finished: list[FinishedRequest] = []
    limits = Limits(num_slots=STREAMS, max_context=MAX_PROMPT_TOKENS + tokens, max_lookahead=3)
    async with TorchEngine.open(model, EngineOptions(limits=limits), finished.append) as engine:

        async def answer(name: str, prompt: tuple[int, ...]) -> None:
            request = GenerationRequest(
                request_id=name,
                prompt_ids=prompt,
                max_tokens=tokens,
                sampling=SamplingParams(temperature=0),
                drafter=Drafter.NGRAM,
                capture=CaptureParams(payload=True, prompt_rows=PROMPT_ROWS),
            )
            async for _ in engine.generate(request):
                pass

        await asyncio.gather(*(answer(name, prompt) for name, prompt in prompts.items()))
        origin = Origin(
            speculator="bench",
            pod="bench",
            engine=engine.info.engine,
            target_fingerprint=engine.info.target_fingerprint,
            tokenizer_fingerprint=engine.info.tokenizer_fingerprint,
        )
    return [_trace(one, origin) for one in sorted(finished, key=lambda one: one.request.request_id)]


def _trace(finished: FinishedRequest, origin: Origin) -> trace_pb2.Trace:
    """Auxiliary states in float8, as a server sends them by default; exact last hidden states."""
    trace_id = hashlib.sha256(finished.request.request_id.encode()).digest()[:16]
    plan = CapturePlan(trace_id=trace_id, is_captured=True, payload_probability=1.0)
    encode = partial(tensors.encode, encoding=trace_pb2.TENSOR_ENCODING_BF16)
    message = trace(Ended(finished=finished, plan=plan, finished_s=0.0), origin, encode)
    aux = tensors.decode(message.payload.aux_hidden)
    message.payload.aux_hidden.CopyFrom(tensors.encode(aux, trace_pb2.TENSOR_ENCODING_FP8_E4M3))
    return message
