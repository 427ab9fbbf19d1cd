"""The synchronous core of the engine: one `step` admits requests, proposes drafts, runs one forward and verifies.

Batching is continuous: requests join and leave between steps. More rows cost little, so the forward that verifies drafts also
reads parts of new prompts, for as long as it does not keep the running streams waiting.
"""

import logging
import random
import time
from collections import deque
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from updraft_chassis.errors import Corrupt
from updraft_inference.engine import Delta, Drafter, EngineLoad, FinishReason, TokenLogprob, VerifyStep
from updraft_inference.torch_engine.drafting.eagle import EagleProposer
from updraft_inference.torch_engine.drafting.lookahead.cost import CostTable
from updraft_inference.torch_engine.drafting.lookahead.planner import LookaheadPlanner
from updraft_inference.torch_engine.drafting.mixture import Chooser
from updraft_inference.torch_engine.drafting.ngram import NgramProposer
from updraft_inference.torch_engine.drafting.speculation import Speculation
from updraft_inference.torch_engine.model.kv_cache import CacheShape, SlotCache
from updraft_inference.torch_engine.model.limits import Limits
from updraft_inference.torch_engine.model.target import ForwardOutput, Target
from updraft_inference.torch_engine.proposal import Proposal
from updraft_inference.torch_engine.sampling.rejection_sampler import VerifyResult
from updraft_inference.torch_engine.scheduler.admission import Admission
from updraft_inference.torch_engine.scheduler.forward import ForwardChunk, num_rows, run_forward
from updraft_inference.torch_engine.scheduler.prefill import MAX_TOKENS, prefill_budget, prompt_chunks
from updraft_inference.torch_engine.scheduler.prefix_cache import cached_prefix
from updraft_inference.torch_engine.scheduler.slots import Slots
from updraft_inference.torch_engine.scheduler.warm_up import cost_curve
from updraft_inference.torch_engine.sequence import Sequence
from updraft_tap.drafting.speedup import SpeedupMeter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Experience:
    """The statistics of its traffic by which a scheduler decides. The costs of steps belong to the machine."""

    ngram: NgramProposer
    chooser: Chooser
    planner: LookaheadPlanner
    speedup: SpeedupMeter

    def without_traffic(self, num_remembered: int) -> Self:
        """That of a scheduler on this machine that has served nothing yet."""
        planner = LookaheadPlanner(self.planner.cost, is_fixed=self.planner.is_fixed)
        return type(self)(NgramProposer(num_remembered), Chooser(), planner, SpeedupMeter(random.Random(0)))


class Scheduler:
    """Runs requests to their end. Not thread-safe; the engine thread owns it and all that it holds."""

    def __init__(self, target: Target, limits: Limits, *, default: Drafter, is_lookahead_fixed: bool = False) -> None:
        c = target.config
        self.target = target
        self.limits = limits
        shape = CacheShape(
            num_layers=c.num_layers,
            num_slots=limits.num_slots,
            num_positions=limits.num_positions,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
        )
        self._cache = SlotCache(shape, like=target.embedding)
        drafted = 1 + max(limits.max_lookup, limits.max_lookahead)
        curve = cost_curve(target, self._cache, most=max(MAX_TOKENS, limits.num_slots * drafted), drafted=drafted)
        self.planner = LookaheadPlanner(CostTable(curve), is_fixed=is_lookahead_fixed)
        self.speculation = Speculation(limits, self.planner, default=default)
        self.speedup = SpeedupMeter(random.Random(0))
        self._slots = Slots(limits.num_slots)
        self._admission = Admission(self._slots, self._cache, self.speculation)
        self._num_steps = 0
        self._prefilling: deque[Sequence] = deque()
        self._decoding: dict[int, Sequence] = {}

    @property
    def is_idle(self) -> bool:
        return not (self._admission.waiting or self._prefilling or self._decoding)

    @property
    def load(self) -> EngineLoad:
        """Any thread may read it."""
        running = self._running()
        return EngineLoad(
            running=len(running),
            queued=len(self._admission.waiting),
            used_tokens=sum(sequence.num_computed_tokens for sequence in running),
            lookahead=self.planner.last,
            cached_tokens=self._admission.num_cached_tokens,
        )

    @property
    def experience(self) -> Experience:
        return Experience(self.speculation.ngram, self.speculation.chooser, self.planner, self.speedup)

    def adopt(self, experience: Experience) -> None:
        """Decide by this experience from now on. Nothing may run."""
        self.speculation.ngram, self.speculation.chooser = experience.ngram, experience.chooser
        self.planner = self.speculation.planner = experience.planner
        self.speedup = experience.speedup

    def install(self, eagle: EagleProposer | None, version: int) -> None:
        """Draft with another network from now on, or with none."""
        self.speculation.install(eagle, version, self._all())
        self.speedup.serve(version)
        self._forget_draft_rows()

    def renew(self, version: int) -> None:
        """The draft has other weights. Running requests go on over the rows of the old ones, which no other request gets."""
        self.speculation.renew(version)
        self.speedup.serve(version)
        self._forget_draft_rows()

    def add(self, sequence: Sequence) -> None:
        self._admission.waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """End a request now, if it has not ended."""
        for sequence in self._all():
            if sequence.request.request_id == request_id:
                self._end(sequence, FinishReason.CANCELLED, [])

    def cancel_all(self) -> None:
        for sequence in self._all():
            self._end(sequence, FinishReason.CANCELLED, [])

    def step(self) -> None:
        """Admit what fits, verify the drafts of running requests, and read on in the prompts of the others."""
        self._prefilling += self._admission.admit(self._running())
        self._num_steps += 1
        started = time.perf_counter()
        self.speculation.keep_up(self._running())
        decoding = [self._decoding[slot] for slot in sorted(self._decoding)]
        alone = self.speculation.draw_alone(decoding)  # evidence about the draft, whether drafting pays or not
        is_free = not alone and self.speculation.is_free(decoding)
        is_plain = is_free and not self.speedup.allows_drafts(len(decoding))
        proposals = [Proposal()] * len(decoding) if is_plain else self.speculation.propose(decoding, alone)
        drafts = [
            ForwardChunk(sequence=sequence, ids=[sequence.ids[-1], *proposal.ids], proposal=proposal)
            for sequence, proposal in zip(decoding, proposals, strict=True)
        ]
        cost, num_drafts = self.planner.cost, num_rows(drafts)
        budget = prefill_budget(self._num_steps, batch=len(decoding), num_drafts=num_drafts, cost=cost)
        prompts = prompt_chunks(self._prefilling, budget)
        num_tokens = self._compute(drafts, prompts, started)
        if is_free and not prompts:
            seconds = time.perf_counter() - started
            self.speedup.observe(len(decoding), num_tokens, seconds, is_drafted=not is_plain)

    def _compute(self, drafts: list[ForwardChunk], prompts: list[ForwardChunk], started: float) -> int:
        """Run one forward over all chunks and apply its results. Returns the number of tokens that running requests got."""
        drafted, before = time.perf_counter(), _num_output(drafts)
        results = run_forward(self.target, self._cache, [*drafts, *prompts])
        now = time.perf_counter()
        self.planner.observe_step(
            batch=len(drafts),
            rows=num_rows(drafts) + num_rows(prompts),
            num_prompt_rows=num_rows(prompts),
            seconds=now - drafted,
        )
        for chunk, rows, result in results:
            if not result.is_finite:
                self._abort(chunk.sequence)
            elif chunk.is_prompt:
                self._finish_prefill(chunk, rows, result)
            else:
                self._apply_verification(chunk, rows, result, batch=len(drafts), duration_s=now - started)
        return _num_output(drafts) - before

    def _running(self) -> list[Sequence]:
        return [*self._prefilling, *self._decoding.values()]

    def _all(self) -> list[Sequence]:
        return [*self._admission.waiting, *self._running()]

    def _forget_draft_rows(self) -> None:
        self._slots.forget_drafts()
        for sequence in self._all():
            sequence.has_old_draft_rows = sequence.num_computed_draft_tokens > 0

    def _finish_prefill(self, chunk: ForwardChunk, rows: ForwardOutput, result: VerifyResult) -> None:
        """Count a part of a prompt; at its end the sequence begins to decode."""
        sequence = chunk.sequence
        self._accept(sequence, rows.aux, rows.last)
        if not sequence.is_prefilling:
            self._prefilling.remove(sequence)
            self._decoding[sequence.slot] = sequence
            self._append(sequence, [result.bonus_id], result.logprobs)

    def _apply_verification(
        self, chunk: ForwardChunk, rows: ForwardOutput, result: VerifyResult, *, batch: int, duration_s: float
    ) -> None:
        sequence, proposal, num = chunk.sequence, chunk.proposal, result.accepted + 1
        self.speculation.observe_verification(sequence, proposal, result.accepted, result.bonus_id)
        sequence.steps.append(
            VerifyStep(
                start=sequence.num_output,
                accepted=result.accepted,
                draft_ids=tuple(proposal.ids),
                draft_log_probs=tuple(proposal.log_probs),
                target_log_probs=tuple(result.target_log_probs),
                batch_size=batch,
                duration_s=duration_s,
                drafter=proposal.drafter,
                draft_version=self.speculation.draft_version if proposal.is_chain else 0,
                looked_up=proposal.looked_up,
            )
        )
        self._accept(sequence, rows.aux[:num], rows.last[:num])
        # Rows that read an n-gram draft would show nothing about the draft model.
        if proposal.is_chain and sequence.request.capture.counterfactual_rows:
            end = 1 + next((index for index in proposal.looked_up if index >= result.accepted), len(proposal.ids))
            sequence.keep_rejected(rows.aux[num:end], rows.last[num:end])
        self._append(sequence, [*proposal.ids[: result.accepted], result.bonus_id], result.logprobs)

    def _accept(self, sequence: Sequence, aux_RA: Tensor, last_RD: Tensor) -> None:
        """The next rows of the sequence are final: hand them to the payload and to the draft."""
        sequence.keep(sequence.num_computed_tokens, aux_RA, last_RD)
        sequence.num_computed_tokens += len(aux_RA)
        self.speculation.observe(sequence, aux_RA)

    def _append(self, sequence: Sequence, token_ids: list[int], logprobs: tuple[TokenLogprob, ...]) -> None:
        """Append new tokens, and end the request if they end it."""
        before = len(sequence.ids)
        self.speculation.observe_tokens(sequence, token_ids)
        if sequence.first_token_s is None:
            sequence.first_token_s = time.monotonic()
        reason = sequence.extend(token_ids, self.target.config.eos_token_ids)
        appended = sequence.ids[before:]
        if reason is None:
            sequence.emit(Delta(token_ids=tuple(appended), logprobs=logprobs))
        else:
            self._end(sequence, reason, appended, logprobs[: len(appended)])

    def _abort(self, sequence: Sequence) -> None:
        """End a request whose logits are not finite, and wipe its rows: see `EagleProposer.forget`."""
        sequence.failure = Corrupt("the model's logits for this request are not finite")
        logger.error("The target's logits are not finite", extra={"position": sequence.num_computed_tokens})
        self._cache.wipe(sequence.slot)
        self.speculation.forget(sequence)
        self._end(sequence, FinishReason.CANCELLED, [])
        self._slots.forget(sequence.slot)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: list[int],
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> None:
        """Emit the last delta and release the slot."""
        for queue in (self._admission.waiting, self._prefilling):
            if sequence in queue:
                queue.remove(sequence)
        self._decoding.pop(sequence.slot, None)
        sequence.emit(Delta(token_ids=tuple(token_ids), logprobs=logprobs, finished=sequence.finished(reason)))
        self.speculation.finish(sequence, is_cancelled=reason is FinishReason.CANCELLED)
        if sequence.slot >= 0:
            self._slots.release(cached_prefix(sequence))


def _num_output(chunks: list[ForwardChunk]) -> int:
    """Tokens that their requests have got so far."""
    return sum(chunk.sequence.num_output for chunk in chunks)
