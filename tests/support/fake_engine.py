"""An engine without a model: it says a script, a few tokens a step, and keeps every promise of the port."""

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import torch

from updraft_chassis.errors import Corrupt, Exhausted, InvalidInput, Unavailable, UpdraftError
from updraft_inference.engine import (
    CaptureLoss,
    Counterfactual,
    Delta,
    DraftCheckpoint,
    Drafter,
    EngineInfo,
    EngineLoad,
    FinishedRequest,
    FinishedSink,
    FinishReason,
    GenerationRequest,
    HiddenStates,
    LoadedDraft,
    SwapResult,
    TokenLogprob,
    VerifyStep,
)
from updraft_tap.drafting.speedup import Speedup

EOS = 257
"""`<|end|>` of tests.support.tiny_tokenizer."""
HIDDEN_SIZE = 4
NUM_AUX = 3

Script = Callable[[GenerationRequest], Iterator[int]]


def alphabet(request: GenerationRequest) -> Iterator[int]:
    """Letters for ever, from one that depends on the prompt."""
    first = sum(request.prompt_ids)
    return (ord("a") + (first + i) % 26 for i in count())


def saying(text: str) -> Script:
    """`text` in UTF-8, a byte a token, then the end token."""
    return lambda _: iter([*text.encode(), EOS])


class NoEstimates:
    """Of an engine that chooses no lookahead."""

    def survival(self, drafter: Drafter, length: int) -> float:
        return math.nan

    def step_seconds(self, rows: int) -> float:
        return math.nan


class FakeEngine:
    """Emits the script of a request. While `go` is clear, requests that hold a slot stand still."""

    def __init__(
        self,
        *,
        script: Script = alphabet,
        on_finished: FinishedSink = lambda _: None,
        num_slots: int = 2,
        max_queued: int = 2,
        max_context: int = 256,
        step_s: float = 0.0,
    ) -> None:
        self.script = script
        self.on_finished = on_finished
        self.go = asyncio.Event()
        self.go.set()
        self.is_alive = True
        self.device = "cpu"
        self.capture_problem = ""
        self.capture_losses: Counter[CaptureLoss] = Counter()
        self.lookahead_estimates = NoEstimates()
        self.speedups: dict[int, Speedup] = {}
        self.faults: Counter[int] = Counter()
        self.is_comparing = False
        self._slots = asyncio.Semaphore(num_slots)
        self._capacity = num_slots + max_queued
        self._submitted = 0
        self._running = 0
        self._step_s = step_s
        self._loaded = LoadedDraft()
        self._rot = ""
        self.refusal: UpdraftError | None = None
        """What `verify` raises."""
        self.swap_refusal: UpdraftError | None = None
        self.may_swap = asyncio.Event()
        """While it is clear, a swap hangs."""
        self.num_begun = 0
        """Swaps so far, with those that hang."""
        self.may_swap.set()
        self._info = EngineInfo(
            engine="fake/1",
            target_fingerprint="sha256:target",
            tokenizer_fingerprint="sha256:tokenizer",
            max_context=max_context,
            num_slots=num_slots,
            vocab_size=258,
            eos_token_ids=frozenset({EOS}),
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def loaded(self) -> LoadedDraft:
        return self._loaded

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(running=self._running, queued=self._submitted - self._running)

    def compare(self, *, is_comparing: bool) -> None:
        self.is_comparing = is_comparing

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        self._check(request)
        output: list[int] = []
        steps: list[VerifyStep] = []
        ending = FinishReason.CANCELLED
        with self._submission():
            try:
                async with self._slots:
                    with self._slot():
                        async for token_ids in self._steps(request, output, steps):
                            reason = self._reason(request, output)
                            if reason is None:
                                yield Delta(token_ids=token_ids, logprobs=_logprobs(request, token_ids))
                            else:
                                ending = reason
                                break
            finally:
                finished = _finished(request, output, steps, ending)
                self.on_finished(finished)
        yield Delta(token_ids=token_ids, logprobs=_logprobs(request, token_ids), finished=finished)

    async def swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        self.num_begun += 1
        await self.may_swap.wait()
        if self.swap_refusal is not None:
            raise self.swap_refusal
        if draft is None:
            self._loaded = LoadedDraft()
            return SwapResult(loaded=self._loaded, pause_s=0.001)
        weights = draft.folder / "model.safetensors"
        if not weights.is_file():
            raise InvalidInput(f"{draft.folder} holds no draft")
        content = await asyncio.to_thread(weights.read_bytes)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if digest != draft.tensors_digest:
            raise Corrupt(f"version {draft.version} holds {digest}, not {draft.tensors_digest}")
        if b"nan" in content:
            raise Corrupt(f"version {draft.version} holds values that are not finite")
        self._rot = ""
        self._loaded = LoadedDraft(version=draft.version, tensors_digest=digest)
        return SwapResult(loaded=self._loaded, pause_s=0.001)

    def rot(self) -> None:
        """A bit of the draft flips in memory."""
        self._rot = "sha256:rotten"

    async def rehash(self) -> LoadedDraft:
        if self.refusal is not None:
            raise self.refusal
        if self._rot and self._loaded.version:
            self._loaded = replace(self._loaded, tensors_digest=self._rot)
        return self._loaded

    def _check(self, request: GenerationRequest) -> None:
        if not self.is_alive:
            raise Unavailable("the engine has stopped")
        num_prompt = len(request.prompt_ids)
        if not num_prompt or request.max_tokens < 1:
            raise InvalidInput("nothing to continue, or nothing to generate")
        if num_prompt + request.max_tokens > self._info.max_context:
            raise InvalidInput(f"more than {self._info.max_context} tokens")
        if not all(0 <= token < self._info.vocab_size for token in request.prompt_ids):
            raise InvalidInput("a prompt token is outside the vocabulary")
        if self._submitted >= self._capacity:
            raise Exhausted("the queue is full")

    @contextmanager
    def _submission(self) -> Iterator[None]:
        self._submitted += 1
        try:
            yield
        finally:
            self._submitted -= 1

    @contextmanager
    def _slot(self) -> Iterator[None]:
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def _steps(
        self, request: GenerationRequest, output: list[int], steps: list[VerifyStep]
    ) -> AsyncGenerator[tuple[int, ...], None]:
        """One token of the prefill, then verify steps whose acceptance goes 0, 1, ..., k, 0, 1, ..."""
        script = self.script(request)
        for index in count():
            await self.go.wait()
            await asyncio.sleep(self._step_s)
            start = len(output)
            wanted = [next(script)] if index == 0 else self._verify(request, script, start, index, steps)
            output += self._cut(request, wanted, start)
            yield tuple(output[start:])

    def _verify(
        self, request: GenerationRequest, script: Iterator[int], start: int, index: int, steps: list[VerifyStep]
    ) -> list[int]:
        drafter = request.drafter or (Drafter.EAGLE3 if self._loaded.version else Drafter.NONE)
        k = 0 if drafter is Drafter.NONE else 2 if request.lookahead is None else request.lookahead
        accepted = index % (k + 1)
        tokens = [token for _, token in zip(range(accepted + 1), script, strict=False)]
        drafts = (*tokens[:accepted], *([0] * k))[:k]
        steps.append(
            VerifyStep(
                start=start,
                accepted=accepted,
                draft_ids=drafts,
                draft_log_probs=(-0.5,) * k,
                target_log_probs=(-0.25,) * k,
                batch_size=self._running,
                duration_s=0.01,
                drafter=drafter if k else Drafter.NONE,
                draft_version=self._loaded.version if drafter is Drafter.EAGLE3 and k else 0,
            )
        )
        return tokens

    def _cut(self, request: GenerationRequest, tokens: list[int], start: int) -> list[int]:
        tokens = tokens[: request.max_tokens - start]
        if EOS in tokens and not request.ignore_eos:
            tokens = tokens[: tokens.index(EOS) + 1]
        return tokens

    def _reason(self, request: GenerationRequest, output: list[int]) -> FinishReason | None:
        if output and output[-1] == EOS and not request.ignore_eos:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(output) >= request.max_tokens else None


def _logprobs(request: GenerationRequest, token_ids: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
    """The token itself is likeliest, then come those after it."""
    num_top = request.top_logprobs
    if num_top is None:
        return ()
    return tuple(
        TokenLogprob(
            token_id=token,
            log_prob=-0.25,
            top=tuple(((token + i) % 258, -0.25 - i) for i in range(num_top)),
        )
        for token in token_ids
    )


def _finished(
    request: GenerationRequest, output: list[int], steps: list[VerifyStep], reason: FinishReason
) -> FinishedRequest:
    return FinishedRequest(
        request=request,
        output_ids=tuple(output),
        steps=tuple(steps),
        reason=reason,
        time_to_first_token_s=0.01,
        duration_s=0.01 * (1 + len(steps)),
        hidden=_hidden(request, len(output), steps) if request.capture.payload and output else None,
    )


def _hidden(request: GenerationRequest, num_output: int, steps: list[VerifyStep]) -> HiddenStates:
    first = max(0, len(request.prompt_ids) - request.capture.prompt_rows)
    positions = torch.arange(first, len(request.prompt_ids) + num_output - 1, dtype=torch.float32)
    return HiddenStates(
        first_position=first,
        aux=positions[:, None].expand(-1, NUM_AUX * HIDDEN_SIZE).clone(),
        teacher=-positions[:, None].expand(-1, HIDDEN_SIZE).clone(),
        counterfactuals=tuple(_counterfactuals(request.capture.counterfactual_rows, num_output, steps)),
    )


def _counterfactuals(limit: int, num_output: int, steps: list[VerifyStep]) -> Iterator[Counterfactual]:
    for index, step in enumerate(steps):
        rows = min(limit, len(step.draft_ids) - step.accepted)
        if rows and step.drafter is Drafter.EAGLE3 and step.start + step.accepted < num_output:
            aux, last = torch.ones(rows, NUM_AUX * HIDDEN_SIZE), torch.ones(rows, HIDDEN_SIZE)
            yield Counterfactual(step=index, aux=aux, teacher=last)
