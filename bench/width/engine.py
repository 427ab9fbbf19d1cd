"""An engine without a model: it holds a draft of full size and proves it by digest, and a teacher answers its requests."""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from bench.width.teacher import RandomTeacher, RuleTeacher, Teacher
from bench.width.traffic import Width
from tests.support.checkpoints import TARGET

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
    Speedup,
    SwapResult,
    VerifyStep,
    check_limits,
)
from updraft_inference.settings import InferenceSettings

_BLOCK_BYTES = 8 * 1024 * 1024

Tensors = dict[safetensors_header.TensorSpan, bytearray]


class SyntheticEngine:
    """Holds tensors, and finishes requests at once with random states."""

    is_alive = True
    capture_problem = ""
    lookahead_estimates = None

    def __init__(self, on_finished: FinishedSink, teacher: Teacher, info: EngineInfo) -> None:
        self._on_finished = on_finished
        self._teacher = teacher
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
        """Answer at once with `max_tokens` tokens; whoever sends requests sets the rate."""
        check_limits(request, self.info)
        finished = await asyncio.to_thread(self._finish, request)
        self._on_finished(finished)
        yield Delta(token_ids=finished.output_ids, finished=finished)

    def _finish(self, request: GenerationRequest) -> FinishedRequest:
        output_ids, hidden = self._teacher.answer(request)
        return FinishedRequest(
            request=request,
            output_ids=output_ids,
            steps=tuple(_steps(output_ids)),
            reason=FinishReason.LENGTH,
            time_to_first_token_s=0.01,
            duration_s=0.01 * request.max_tokens,
            hidden=hidden,
        )

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
    """Steps of two tokens: the first of three draft tokens is accepted."""
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
    info = EngineInfo(
        engine="synthetic/1",
        target_fingerprint=fingerprint,
        tokenizer_fingerprint=tokenizer,
        max_context=settings.max_context,
        num_slots=64,
        vocab_size=width.vocabulary,
        eos_token_ids=frozenset(),
    )
    yield SyntheticEngine(on_finished, teacher, info)
