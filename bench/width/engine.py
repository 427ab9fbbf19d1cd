"""An engine without a model: it holds a draft of full size and proves it by digest, and a teacher answers its requests.

Hidden states are there when a request ends. Until then they would be with the engine, or with the agent beside a server.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TextIO

from bench.width.teacher import RandomTeacher, RuleTeacher, Teacher
from bench.width.traffic import Width
from tests.support.checkpoints import TARGET
from tests.support.fake_engine import NoEstimates

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts import safetensors_header
from updraft_artifacts.digests import tensors_digest
from updraft_artifacts.model_folder import target_fingerprint, tokenizer_fingerprint
from updraft_chassis.errors import Corrupt
from updraft_inference.engine import (
    CaptureLoss,
    Delta,
    DraftCheckpoint,
    Drafter,
    EngineInfo,
    EngineLoad,
    FinishedRequest,
    FinishedSink,
    FinishReason,
    GenerationRequest,
    LoadedDraft,
    SwapResult,
    VerifyStep,
    check_limits,
)
from updraft_inference.settings import InferenceSettings
from updraft_tap.drafting.speedup import Speedup

HANDED_OVER = "handed_over"
"""A file in a pod's data folder: the output tokens of each request that was handed over with hidden states."""

TICK_TOKENS = 48

_BLOCK_BYTES = 8 * 1024 * 1024

Tensors = dict[safetensors_header.TensorSpan, bytearray]


class SyntheticEngine:
    """Holds tensors, and answers requests at a set pace. A file says how many output tokens it handed over with states."""

    is_alive = True
    device = "cpu"
    capture_problem = ""
    lookahead_estimates = NoEstimates()

    def __init__(
        self, on_finished: FinishedSink, teacher: Teacher, info: EngineInfo, *, tokens_per_s: float, handed_over: TextIO
    ) -> None:
        self._on_finished = on_finished
        self._teacher = teacher
        self._tokens_per_s = tokens_per_s
        self._handed_over = handed_over
        self._tensors: Tensors = {}
        self.info = info
        self.loaded = LoadedDraft()
        self.load = EngineLoad()
        self.speedups: Mapping[int, Speedup] = {}
        self.faults: Mapping[int, int] = {}
        self.capture_losses: Mapping[CaptureLoss, int] = {}

    def compare(self, *, is_comparing: bool) -> None:
        """Nothing is drafted."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Answer with `max_tokens` tokens, a few at a time."""
        check_limits(request, self.info)
        output_ids = self._teacher.answer(request)
        for first in range(0, len(output_ids), TICK_TOKENS):
            some = output_ids[first : first + TICK_TOKENS]
            await asyncio.sleep(len(some) / self._tokens_per_s)
            yield Delta(token_ids=some)
        finished = await asyncio.to_thread(self._finished, request, output_ids)
        if finished.hidden is not None:
            self._handed_over.write(f"{len(output_ids)}\n")
        self._on_finished(finished)
        yield Delta(token_ids=(), finished=finished)

    def _finished(self, request: GenerationRequest, output_ids: tuple[int, ...]) -> FinishedRequest:
        capture = request.capture
        first = max(0, len(request.prompt_ids) - capture.prompt_rows)
        finished = FinishedRequest(
            request=request,
            output_ids=output_ids,
            steps=tuple(_steps(output_ids)),
            reason=FinishReason.LENGTH,
            time_to_first_token_s=0.01,
            duration_s=len(output_ids) / self._tokens_per_s,
            hidden=self._teacher.states(request, output_ids, first) if capture.payload else None,
        )
        _ = finished.sums  # as the agent beside a server does
        return finished

    async def swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        """Load into new memory, prove, then exchange: the old tensors are in use until then."""
        if draft is None:
            self._tensors, self.loaded = {}, LoadedDraft()
            return SwapResult(loaded=self.loaded, pause_s=0.0)
        tensors = await asyncio.to_thread(_load, draft)
        digest = await asyncio.to_thread(_digest, tensors)
        if digest != draft.tensors_digest:
            raise Corrupt(f"version {draft.version} holds {digest}, not {draft.tensors_digest}")
        self._tensors, self.loaded = tensors, LoadedDraft(version=draft.version, tensors_digest=digest)
        return SwapResult(loaded=self.loaded, pause_s=0.0)

    async def rehash(self) -> LoadedDraft:
        return self.loaded


def _steps(output_ids: tuple[int, ...]) -> Iterator[VerifyStep]:
    """Steps of two tokens after the first token: the first of three draft tokens is accepted."""
    for start in range(1, len(output_ids) - 1, 2):
        wrong = output_ids[start + 1] + 1
        yield VerifyStep(
            start=start,
            accepted=1,
            draft_ids=(output_ids[start], wrong, wrong),
            draft_log_probs=(),
            target_log_probs=(),
            batch_size=8,
            duration_s=0.02,
            drafter=Drafter.EAGLE3,
            draft_version=1,
        )


def _load(draft: DraftCheckpoint) -> Tensors:
    tensors: Tensors = {}
    with (draft.folder / "model.safetensors").open("rb", buffering=0) as file:
        for span in safetensors_header.read(file):
            tensor = tensors[span] = bytearray(span.end - span.begin)
            file.seek(span.begin)
            view = memoryview(tensor)
            for begin in range(0, len(view), _BLOCK_BYTES):
                file.readinto(view[begin : begin + _BLOCK_BYTES])
    return tensors


def _digest(tensors: Tensors) -> str:
    return tensors_digest(
        pb.TensorSpec(
            name=span.name, dtype=span.dtype, shape=span.shape, digest=f"sha256:{hashlib.sha256(tensor).hexdigest()}"
        )
        for span, tensor in tensors.items()
    )


@asynccontextmanager
async def open_engine(settings: InferenceSettings, on_finished: FinishedSink) -> AsyncIterator[SyntheticEngine]:
    """By the environment: WIDTH, and WIDTH_TARGET if the answers follow the rule in the embeddings of a target."""
    width, target, fingerprint, tokenizer = (
        Width(**json.loads(os.environ["WIDTH"])),
        os.environ.get("WIDTH_TARGET"),
        TARGET,
        "",
    )
    teacher: Teacher = RandomTeacher(width)
    if target:
        teacher = RuleTeacher(Path(target))
        fingerprint, tokenizer = target_fingerprint(Path(target)), tokenizer_fingerprint(Path(target))
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    info = EngineInfo(
        engine="synthetic/1",
        target_fingerprint=fingerprint,
        tokenizer_fingerprint=tokenizer,
        max_context=settings.max_context,
        num_slots=64,
        vocab_size=width.vocabulary,
        eos_token_ids=frozenset(),
    )
    with (settings.data_dir / HANDED_OVER).open("w", buffering=1) as handed_over:
        yield SyntheticEngine(
            on_finished, teacher, info, tokens_per_s=width.request_tokens_per_s, handed_over=handed_over
        )
