"""Implements the engine port over a scheduler that runs on a thread of its own.

The worker executes messages to the scheduler between two steps, and tokens go back by call_soon_threadsafe. A swap is such a
message, so it ends no request. Reading, checking and hashing a checkpoint happen outside that thread, so decoding pauses only
for the copy.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from updraft_artifacts.digests import tensors_digest
from updraft_artifacts.model_folder import target_fingerprint, tokenizer_fingerprint
from updraft_chassis.errors import Corrupt, Exhausted, InvalidInput, Unavailable
from updraft_draft import checkpoint
from updraft_draft.config import DraftConfig, check_fits
from updraft_draft.network import DraftNetwork
from updraft_inference.engine import (
    CaptureLoss,
    Delta,
    DraftCheckpoint,
    Drafter,
    EngineInfo,
    EngineLoad,
    FinishedSink,
    FinishReason,
    GenerationRequest,
    LoadedDraft,
    LookaheadEstimates,
    SwapResult,
    check_limits,
)
from updraft_inference.torch_engine.drafting.eagle import EagleProposer
from updraft_inference.torch_engine.model.draft import PackedWeights, pack
from updraft_inference.torch_engine.model.limits import Limits
from updraft_inference.torch_engine.model.target import Target
from updraft_inference.torch_engine.sampling.grammar import Grammar, Grammars
from updraft_inference.torch_engine.sampling.logits import check_sampling
from updraft_inference.torch_engine.scheduler.scheduler import Experience, Scheduler
from updraft_inference.torch_engine.sequence import Sequence
from updraft_inference.torch_engine.worker import Worker, on_passing_thread
from updraft_kernels.loader import load_kernels
from updraft_tap.drafting.speedup import Speedup

ENGINE = "torch/0.1.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """`dtype`: of weights, cache and states. Greedy output equals plain decoding exactly in float32 only."""

    limits: Limits
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    use_kernels: bool = True
    """Use the C++ kernels on a CPU, if the package has them for it."""
    drafter: Drafter = Drafter.HYBRID
    """The drafter of requests that name none. Without a draft model, `hybrid` is n-gram lookup."""
    is_lookahead_fixed: bool = False
    max_queued: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeldDraft:
    """The draft to restore if a swap fails its proof."""

    version: int
    eagle: EagleProposer | None
    tensors: Mapping[str, Tensor]
    """A copy of the network's."""


class TorchEngine:
    """Serves one target. Use as an async context manager: entering starts the thread, leaving cancels what runs."""

    capture_problem = ""
    capture_losses: Mapping[CaptureLoss, int] = MappingProxyType({})

    def __init__(
        self,
        target: Target,
        info: EngineInfo,
        options: EngineOptions,
        on_finished: FinishedSink,
        grammars: Grammars,
    ) -> None:
        self._options = options
        self._limits = options.limits
        self._scheduler = Scheduler(
            target, options.limits, default=options.drafter, is_lookahead_fixed=options.is_lookahead_fixed
        )
        self.info = info
        self.device = options.device
        self.loaded = LoadedDraft()
        self._on_finished = on_finished
        self._grammars = grammars
        self._worker = Worker(self._scheduler, self._abandon_all)
        self._submitted = 0
        self._live: dict[str, Callable[[], object]] = {}
        """Tells each running request that the engine has failed."""
        self._swap_lock = asyncio.Lock()
        self._is_closing = False

    @classmethod
    def open(cls, folder: Path, options: EngineOptions, on_finished: FinishedSink = lambda _: None) -> Self:
        """Load the target from a Hugging Face folder. InvalidInput if the engine cannot serve it."""
        return on_passing_thread(lambda: cls._open(folder, options, on_finished))

    @classmethod
    def _open(cls, folder: Path, options: EngineOptions, on_finished: FinishedSink) -> Self:
        limits = options.limits
        device = _device(options.device)
        target = Target.open(
            folder,
            dtype=options.dtype,
            device=device,
            num_positions=limits.num_positions,
            library=load_kernels() if options.use_kernels and device.type == "cpu" else None,
        )
        if limits.max_context > target.config.max_position:
            raise InvalidInput(
                f"a context of {limits.max_context} exceeds the model's {target.config.max_position} positions"
            )
        info = EngineInfo(
            engine=ENGINE,
            target_fingerprint=target_fingerprint(folder),
            tokenizer_fingerprint=tokenizer_fingerprint(folder),
            max_context=limits.max_context,
            num_slots=limits.num_slots,
            vocab_size=target.config.vocab_size,
            eos_token_ids=target.config.eos_token_ids,
            kernels=target.kernels,
        )
        grammars = Grammars(folder, target.config.vocab_size, target.config.eos_token_ids)
        return cls(target, info, options, on_finished, grammars)

    async def __aenter__(self) -> Self:
        await self._worker.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_closing = True
        await self._worker.stop()

    @property
    def load(self) -> EngineLoad:
        return self._scheduler.load

    @property
    def lookahead_estimates(self) -> LookaheadEstimates:
        return self._scheduler.planner

    @property
    def speedups(self) -> Mapping[int, Speedup]:
        return self._scheduler.speedup.speedups

    @property
    def faults(self) -> Mapping[int, int]:
        return self._scheduler.speculation.faults.copy()

    @property
    def is_alive(self) -> bool:
        return self._worker.failure is None

    def compare(self, *, is_comparing: bool) -> None:
        self._scheduler.speculation.is_comparing = is_comparing

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        self._check(request)
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta | None] = asyncio.Queue()

        def emit(delta: Delta) -> None:
            if delta.finished is not None:
                self._on_finished(delta.finished)
            self._worker.delta_queue.put(loop, deltas, delta)

        sequence = Sequence(
            request=request,
            emit=emit,
            ids=list(request.prompt_ids),
            generator=_generator(request),
        )
        self._submitted += 1
        is_over = False
        try:
            sequence.grammar = await self._grammar(sequence)
            self._live[request.request_id] = lambda: loop.call_soon_threadsafe(deltas.put_nowait, None)
            self._check_running()  # the engine may have stopped while the schema was compiled
            self._worker.send(lambda: self._scheduler.add(sequence))
            while not is_over:
                delta = await deltas.get()
                if delta is None:
                    raise Unavailable("the engine failed")
                is_over = delta.finished is not None
                if is_over and sequence.failure is not None:
                    raise sequence.failure
                yield delta
        finally:
            self._submitted -= 1
            self._live.pop(request.request_id, None)
            if not is_over:
                self._worker.send(lambda: self._scheduler.cancel(request.request_id))

    async def swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        async with self._swap_lock:
            if draft is None:
                pause_s = await self._install(None, 0)
                self.loaded = LoadedDraft()
                return SwapResult(loaded=self.loaded, pause_s=pause_s)
            config, tensors = await asyncio.to_thread(self._read, draft)
            previous = await asyncio.to_thread(self._held)  # only a swap writes these tensors, and it holds the lock
            if previous.eagle is not None and previous.eagle.network.config == config:
                pause_s = await self._overwrite(draft.version, tensors)
            else:
                fresh = await asyncio.to_thread(self._build, config, tensors)
                pause_s = await self._install(fresh, draft.version)
            digest = await asyncio.to_thread(self._digest)
            if digest != draft.tensors_digest:
                await self._restore(previous)
                raise Corrupt(
                    f"the engine holds {digest} after loading version {draft.version}, not {draft.tensors_digest}"
                )
            self.loaded = LoadedDraft(version=draft.version, tensors_digest=digest)
            return SwapResult(loaded=self.loaded, pause_s=pause_s)

    async def rehash(self) -> LoadedDraft:
        async with self._swap_lock:
            if self._scheduler.speculation.eagle is not None:
                self.loaded = replace(self.loaded, tensors_digest=await asyncio.to_thread(self._digest))
            return self.loaded

    async def exchange_experience(self, experience: Experience | None = None) -> Experience:
        """Go on with this, or with none, and return what was learnt until now. (For measurements, while nothing runs.)"""
        before = self._scheduler.experience
        new = experience or before.without_traffic(self._limits.num_remembered)
        await self._worker.between_steps(lambda: self._scheduler.adopt(new))
        return before

    # -- outside the engine's thread ----------------------------------------------------------------------------------

    def _check(self, request: GenerationRequest) -> None:
        check_limits(request, self.info)
        check_sampling(request, self.info.vocab_size)
        self._check_running()
        if self._submitted >= self._limits.num_slots + self._options.max_queued:
            raise Exhausted(f"{self._options.max_queued} requests are waiting already")

    def _check_running(self) -> None:
        if self._is_closing or not self._worker.is_running:
            raise Unavailable("the engine has stopped")

    async def _grammar(self, sequence: Sequence) -> Grammar | None:
        schema = sequence.request.json_schema
        if schema is None:
            return None
        try:
            return await asyncio.to_thread(self._grammars.of_json_schema, schema)
        except asyncio.CancelledError:
            self._on_finished(sequence.finished(FinishReason.CANCELLED))  # every request ends exactly once
            raise

    def _read(self, draft: DraftCheckpoint) -> tuple[DraftConfig, dict[str, Tensor]]:
        """Read and check a checkpoint. Every error is raised here, before the decode loop is involved."""
        config, tensors = checkpoint.load(draft.folder)
        reason = check_fits(config, self._scheduler.target.config)
        if reason is not None:
            raise InvalidInput(reason)
        digest = tensors_digest(checkpoint.tensor_specs(sorted(tensors.items())))
        if digest != draft.tensors_digest:
            raise Corrupt(f"version {draft.version} has digest {digest}, but its manifest has {draft.tensors_digest}")
        return config, tensors

    def _build(self, config: DraftConfig, tensors: Mapping[str, Tensor]) -> EagleProposer:
        num_positions = self._limits.num_positions
        network = checkpoint.build(config, tensors, self._scheduler.target.embedding, num_positions=num_positions)
        num_slots, library = self._limits.num_slots, self._scheduler.target.library
        return EagleProposer(network, num_slots=num_slots, num_positions=num_positions, library=library)

    def _held(self) -> _HeldDraft:
        eagle, version = self._scheduler.speculation.eagle, self._scheduler.speculation.draft_version
        tensors = {} if eagle is None else eagle.network.state_dict()
        copied = {name: tensor.clone() for name, tensor in tensors.items()}
        return _HeldDraft(version=version, eagle=eagle, tensors=copied)

    async def _overwrite(self, version: int, tensors: Mapping[str, Tensor]) -> float:
        """Copy weights and vocabulary between two steps. Returns the seconds of the pause."""
        like, library = self._network.lm_head.weight, self._scheduler.target.library
        packed = await asyncio.to_thread(pack, tensors, like=like, library=library)
        return await self._worker.between_steps(lambda: self._write(version, tensors, packed))

    async def _install(self, eagle: EagleProposer | None, version: int) -> float:
        """Draft with another network, whose shape may differ. Running requests go on without the draft model."""
        return await self._worker.between_steps(lambda: self._scheduler.install(eagle, version))

    async def _restore(self, previous: _HeldDraft) -> None:
        if previous.eagle is not None and previous.eagle is self._scheduler.speculation.eagle:
            await self._overwrite(previous.version, previous.tensors)
        else:
            await self._install(previous.eagle, previous.version)

    def _digest(self) -> str:
        """Digest of the weights that draft."""
        eagle = self._scheduler.speculation.eagle
        if eagle is not None and not eagle.is_current():
            return "sha256:unproved"
        return tensors_digest(checkpoint.tensor_specs(checkpoint.checkpoint_tensors(self._network)))

    @property
    def _network(self) -> DraftNetwork:
        eagle = self._scheduler.speculation.eagle
        assert eagle is not None
        return eagle.network

    # -- on the engine's thread ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _write(self, version: int, tensors: Mapping[str, Tensor], packed: PackedWeights) -> None:
        held = self._network.state_dict()
        for name, tensor in tensors.items():
            held[name].copy_(tensor)
        assert self._scheduler.speculation.eagle is not None
        self._scheduler.speculation.eagle.exchange(packed)
        self._scheduler.renew(version)

    def _abandon_all(self) -> None:
        for abandon in list(self._live.values()):
            abandon()


def _generator(request: GenerationRequest) -> torch.Generator | None:
    """None for a greedy request."""
    if request.sampling.temperature <= 0:
        return None
    generator = torch.Generator()
    if request.sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.sampling.seed % 2**63)
    return generator


def _device(name: str) -> torch.device:
    """InvalidInput if torch cannot use the device."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).splitlines()[0]
        raise InvalidInput(f"UPDRAFT_INFERENCE_DEVICE is {name!r}, which torch cannot use here: {reason}") from None
