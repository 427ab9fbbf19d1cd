"""An engine without a model: it holds a draft of full size and proves it by digest, and a teacher answers its requests.

Hidden states of a long request go out in parts while it runs, as those of SGLang do, of the same size and with the same context
(`request_session`, `trace_builder`). A part is in memory for half of the time that its tokens take, which is the mean.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TextIO

from bench.width.teacher import RandomTeacher, RuleTeacher, Teacher
from bench.width.traffic import Width
from tests.support.checkpoints import TARGET
from tests.support.fake_engine import NoEstimates

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts import safetensors_header
from updraft_artifacts.digests import tensors_digest
from updraft_artifacts.model_folder import target_fingerprint, tokenizer_fingerprint
from updraft_artifacts.sizing import PART_BYTES
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
from updraft_inference.tap.trace_builder import KEPT_BYTES

HANDED_OVER = "handed_over"
"""A file in a pod's data folder: the output tokens of each part that was handed over with hidden states."""

TICK_TOKENS = 48

_BLOCK_BYTES = 8 * 1024 * 1024

Tensors = dict[safetensors_header.TensorSpan, bytearray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Tokens per second of a request, and the new rows of a part and those of its context."""

    tokens_per_s: float
    part_rows: int
    context_rows: int

    @classmethod
    def of(cls, width: Width) -> Self:
        return cls(
            tokens_per_s=width.request_tokens_per_s,
            part_rows=(PART_BYTES - KEPT_BYTES) // width.row_memory,
            context_rows=KEPT_BYTES // width.row_memory,
        )


class SyntheticEngine:
    """Holds tensors, and answers requests at a set pace. A file says how many output tokens it handed over with states."""

    is_alive = True
    capture_problem = ""
    lookahead_estimates = NoEstimates()

    def __init__(
        self, on_finished: FinishedSink, teacher: Teacher, info: EngineInfo, *, pace: Pace, handed_over: TextIO
    ) -> None:
        self._on_finished = on_finished
        self._teacher = teacher
        self._pace = pace
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
        """Answer with `max_tokens` tokens, part by part."""
        check_limits(request, self.info)
        output_ids = self._teacher.answer(request)
        steps: list[VerifyStep] = []
        before, num_output = 0, len(output_ids)
        num_rows = self._pace.part_rows if request.capture.payload else num_output
        while before < num_output:
            end = min((before + num_rows) | 1, num_output)  # odd, so that no step is in two parts
            middle = (before + end) // 2
            async for delta in self._deltas(output_ids[before:middle]):
                yield delta
            steps += _steps(output_ids, len(steps), (end - 1) // 2)
            part = await asyncio.to_thread(self._part, request, output_ids[:end], tuple(steps), before)
            async for delta in self._deltas(output_ids[middle:end]):
                yield delta
            if part.hidden is not None:
                self._handed_over.write(f"{end - before}\n")
            self._on_finished(part)
            before = end
        yield Delta(token_ids=(), finished=part)

    async def _deltas(self, token_ids: tuple[int, ...]) -> AsyncIterator[Delta]:
        """Tokens at the set pace, a few at a time."""
        for first in range(0, len(token_ids), TICK_TOKENS):
            some = token_ids[first : first + TICK_TOKENS]
            await asyncio.sleep(len(some) / self._pace.tokens_per_s)
            yield Delta(token_ids=some)

    def _part(
        self, request: GenerationRequest, output_ids: tuple[int, ...], steps: tuple[VerifyStep, ...], before: int
    ) -> FinishedRequest:
        """The tokens from `before` on, with their states and the context of these."""
        num_prompt, capture = len(request.prompt_ids), request.capture
        first = num_prompt + before - 1 - self._pace.context_rows if before else num_prompt - capture.prompt_rows
        part = FinishedRequest(
            request=request,
            output_ids=output_ids,
            steps=steps,
            reason=FinishReason.LENGTH,
            time_to_first_token_s=0.01,
            duration_s=len(output_ids) / self._pace.tokens_per_s,
            hidden=self._teacher.states(request, output_ids, max(0, first)) if capture.payload else None,
            num_handed_over=before,
            is_part=len(output_ids) < request.max_tokens,
        )
        if not part.is_part:
            _ = part.step_sums  # as the port of SGLang does
        return part

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


def _steps(output_ids: tuple[int, ...], first: int, end: int) -> Iterator[VerifyStep]:
    """Steps of two tokens, from number `first` on: the first of three draft tokens is accepted."""
    for start in range(1 + 2 * first, 1 + 2 * end, 2):
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
        yield SyntheticEngine(on_finished, teacher, info, pace=Pace.of(width), handed_over=handed_over)
