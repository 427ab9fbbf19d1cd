"""The synchronous heart of the engine: one `step` is admit, propose, one forward, judge.

Continuous batching: requests join and leave between steps. A forward costs little more for more rows, so the one that
verifies what running requests have drafted also reads on in the prompts of those to come: a piece that makes it last so much
longer as running streams may wait (Agrawal et al. 2024, Sarathi-Serve).
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from updraft_chassis.errors import Corrupt
from updraft_inference.engine import Delta, Drafter, FinishReason, TokenLogprob, VerifyStep
from updraft_inference.torch_engine.drafting.eagle import EagleProposer, NotFiniteError
from updraft_inference.torch_engine.drafting.lookahead.choice import Choice
from updraft_inference.torch_engine.drafting.lookahead.cost import CostTable
from updraft_inference.torch_engine.drafting.lookahead.policy import Ask, Lookahead
from updraft_inference.torch_engine.drafting.ngram import NgramProposer
from updraft_inference.torch_engine.drafting.ngram_index import NOTHING, NgramMatch
from updraft_inference.torch_engine.model.kv_cache import CacheShape, SlotCache
from updraft_inference.torch_engine.model.limits import Limits
from updraft_inference.torch_engine.model.target import ForwardOutput, Target
from updraft_inference.torch_engine.sampling.rejection_sampler import VerifyResult
from updraft_inference.torch_engine.scheduler.forward import ForwardChunk, num_rows, run_forward
from updraft_inference.torch_engine.scheduler.prefill import MOST_READ, prefill_budget
from updraft_inference.torch_engine.scheduler.prefix_cache import CachedPrefix, PrefixMatch
from updraft_inference.torch_engine.scheduler.slots import Slots
from updraft_inference.torch_engine.scheduler.warm_up import cost_curve
from updraft_inference.torch_engine.sequence import Proposal, Sequence

logger = logging.getLogger(__name__)

_BY_MODEL = frozenset({Drafter.EAGLE3, Drafter.HYBRID})
_BY_LOOKUP = frozenset({Drafter.NGRAM, Drafter.HYBRID})

Reading = Callable[[EagleProposer, list[Sequence]], dict[Sequence, int]]


class Scheduler:
    """Runs requests to their end. Not thread-safe; the engine thread owns it and whatever it holds."""

    def __init__(self, target: Target, limits: Limits, *, default: Drafter, is_lookahead_fixed: bool = False) -> None:
        c = target.config
        self.target = target
        self.limits = limits
        self.eagle: EagleProposer | None = None
        self.draft_version = 0
        self.faults: Counter[int] = Counter()
        """By draft version; read by other threads."""
        self._default = default
        shape = CacheShape(
            num_layers=c.num_layers,
            num_slots=limits.num_slots,
            num_positions=limits.num_positions,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
        )
        self._cache = SlotCache(shape, like=target.embedding)
        drafted = 1 + max(limits.max_lookup, limits.max_lookahead)
        curve = cost_curve(target, self._cache, most=max(MOST_READ, limits.num_slots * drafted), drafted=drafted)
        self.lookahead = Lookahead(CostTable(curve), is_fixed=is_lookahead_fixed)
        self.lookups = NgramProposer(limits.num_remembered)
        self._slots = Slots(limits.num_slots)
        self.num_cached_tokens = 0
        """Prompt tokens that were not read, since another request had read them; read by other threads."""
        self._num_steps = 0
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._decoding: dict[int, Sequence] = {}

    @property
    def is_idle(self) -> bool:
        """Nothing to do."""
        return not (self._waiting or self._prefilling or self._decoding)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_used_tokens(self) -> int:
        """Cache positions in use."""
        return sum(s.num_computed_tokens for s in self._held())

    def install(self, eagle: EagleProposer | None, version: int) -> None:
        """Draft with another network from now on, or with none: what an earlier one had read is nothing to it."""
        self.eagle = eagle
        for sequence in self._all():
            sequence.is_draftable = sequence.num_computed_tokens == 0
            sequence.num_computed_draft_tokens = 0
        self.renew(version)

    def renew(self, version: int) -> None:
        """The network has other weights: running requests draft on over what the old ones read, and hand it to nobody."""
        self.draft_version = version
        self.lookahead.reset_model()
        self._slots.forget_drafts()
        for sequence in self._all():
            sequence.has_old_draft_rows = sequence.num_computed_draft_tokens > 0

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """End a request now; nothing happens if it has ended."""
        for sequence in self._all():
            if sequence.request.request_id == request_id:
                self._end(sequence, FinishReason.CANCELLED, [])

    def cancel_all(self) -> None:
        """End every request now."""
        for sequence in self._all():
            self._end(sequence, FinishReason.CANCELLED, [])

    def step(self) -> None:
        """Admit what fits; then verify what is drafted for running requests, and read on in the prompts of the others."""
        self._admit()
        self.lookups.read_on()
        self._num_steps += 1
        started = time.perf_counter()
        running = [self._decoding[slot] for slot in sorted(self._decoding)]
        self._let_read(self._held(), EagleProposer.keep_up)
        drafts = [
            ForwardChunk(sequence=each, ids=[each.ids[-1], *proposal.ids], proposal=proposal)
            for each, proposal in zip(running, self._propose(running), strict=True)
        ]
        self._advance(drafts, self._read_on(num_rows(drafts)), started)

    def _held(self) -> list[Sequence]:
        return [*self._prefilling, *self._decoding.values()]

    def _all(self) -> list[Sequence]:
        return [*self._waiting, *self._held()]

    def _admit(self) -> None:
        while self._waiting and self._slots.has_free:
            sequence = self._waiting.popleft()
            self._begin(sequence)
            self._prefilling.append(sequence)

    def _begin(self, sequence: Sequence) -> None:
        """After what another request has read already of the same prompt; the last token is always read."""
        running = [each.tenant for each in self._held()]
        prefix, eagle = self._prefix(sequence, running)
        sequence.is_draftable = eagle is not None
        sequence.slot = self._slots.take(running, prefix)
        if not prefix.length:
            return
        if prefix.slot != sequence.slot:
            self._cache.copy_prefix(prefix.slot, sequence.slot, prefix.length)
        sequence.num_computed_tokens = prefix.length
        self.num_cached_tokens += prefix.length
        if eagle is not None:
            if prefix.slot != sequence.slot:
                eagle.copy_prefix(prefix.slot, sequence.slot, prefix.length)
            sequence.num_computed_draft_tokens = prefix.length

    def _prefix(self, sequence: Sequence, running: list[CachedPrefix]) -> tuple[PrefixMatch, EagleProposer | None]:
        """What is held already of its prompt, and who drafts for it beside lookups."""
        request, kept = sequence.request, sequence.request.capture
        most = sequence.num_prompt - max(1, kept.prompt_rows if kept.payload else 0)
        find = partial(self._slots.find, sequence.ids, running, client=request.client, most=most)
        can_draft = self.eagle is not None and self._wish(sequence) in _BY_MODEL
        if not can_draft or (
            self._may_leave(sequence) and not self.lookahead.admits_model(1 + len(running) + len(self._waiting))
        ):
            return find(with_draft=False), None
        return find(with_draft=True), self.eagle

    def _read_on(self, num_drafts: int) -> list[ForwardChunk]:
        """What to read of prompts beside so many rows of drafts, first of those who came first."""
        pieces, cost = [], self.lookahead.cost
        left = prefill_budget(self._num_steps, batch=len(self._decoding), num_drafts=num_drafts, cost=cost)
        for sequence in self._prefilling:
            ids = sequence.ids[sequence.num_computed_tokens : sequence.num_computed_tokens + left]
            left -= len(ids)
            if ids:
                pieces.append(ForwardChunk(sequence=sequence, ids=ids, is_of_prompt=True))
        return pieces

    def _advance(self, drafts: list[ForwardChunk], prompts: list[ForwardChunk], started: float) -> None:
        """One forward over all pieces, and what each sequence gains by it."""
        drafted = time.perf_counter()
        outcomes = run_forward(self.target, self._cache, [*drafts, *prompts])
        now = time.perf_counter()
        self.lookahead.observe_step(
            batch=len(drafts),
            rows=num_rows(drafts) + num_rows(prompts),
            num_beside=num_rows(prompts),
            verify_s=now - drafted,
        )
        for piece, rows, verdict in outcomes:
            if not verdict.is_finite:
                self._break_off(piece.sequence)
            elif piece.is_of_prompt:
                self._was_read(piece, rows, verdict)
            else:
                self._was_verified(piece, rows, verdict, batch=len(drafts), duration_s=now - started)

    def _was_read(self, piece: ForwardChunk, rows: ForwardOutput, verdict: VerifyResult) -> None:
        sequence, start = piece.sequence, piece.sequence.num_computed_tokens
        sequence.num_computed_tokens += len(piece.ids)
        self._observe(sequence, start, rows.aux, rows.last)
        if not sequence.is_prefilling:
            self._prefilling.remove(sequence)
            self._decoding[sequence.slot] = sequence
            self._gain(sequence, [verdict.bonus_id], verdict.logprobs)

    def _was_verified(
        self, piece: ForwardChunk, rows: ForwardOutput, verdict: VerifyResult, *, batch: int, duration_s: float
    ) -> None:
        sequence, proposal, start = piece.sequence, piece.proposal, piece.sequence.num_computed_tokens
        kept = verdict.accepted + 1
        sequence.num_computed_tokens += kept
        self._record(sequence, proposal, verdict, batch, duration_s)
        self._observe(sequence, start, rows.aux[:kept], rows.last[:kept])
        # Rows after the rejection of a lookup would say nothing about the draft.
        if proposal.drafter is Drafter.EAGLE3 and sequence.request.capture.counterfactual_rows:
            sequence.keep_rejected(rows.aux[kept:], rows.last[kept:])
        self._gain(sequence, [*proposal.ids[: verdict.accepted], verdict.bonus_id], verdict.logprobs)

    def _propose(self, sequences: list[Sequence]) -> list[Proposal]:
        """The drafts of each sequence, as many and by whom the lookahead chooses; the model's in one batch."""
        if not sequences:
            return []
        lookups = [self._look_up(sequence) for sequence in sequences]
        asks = [self._ask(sequence, lookup) for sequence, lookup in zip(sequences, lookups, strict=True)]
        choices = self.lookahead.plan(asks)
        chosen = [pair for pair in zip(sequences, choices, strict=True) if pair[1].drafter is Drafter.EAGLE3]
        chains = self._chains(chosen)
        proposals = []
        for sequence, lookup, choice in zip(sequences, lookups, choices, strict=True):
            if choice.drafter is Drafter.NGRAM:
                ids = lookup.ids[: choice.length]
                proposals.append(Proposal(drafter=Drafter.NGRAM, ids=ids, log_probs=[0.0] * len(ids)))
            else:
                proposals.append(chains.get(sequence.slot, Proposal()))
        return proposals

    def _look_up(self, sequence: Sequence) -> NgramMatch:
        if self._wish(sequence) not in _BY_LOOKUP:
            return NOTHING
        most = self.limits.max_lookup if self.limits.max_lookahead else 0
        lookup = self.lookups.propose(sequence, min(most, sequence.num_useful))
        if lookup.ids:
            sequence.shadow.take(lookup.ids, lookup.kind)
        return lookup

    def _ask(self, sequence: Sequence, lookup: NgramMatch) -> Ask:
        can_chain = self.eagle is not None and sequence.is_draftable and self._wish(sequence) in _BY_MODEL
        return Ask(
            record=sequence.history,
            lookup=len(lookup.ids),
            kind=lookup.kind if self._wish(sequence) in _BY_LOOKUP else None,
            chain=min(self.limits.max_lookahead, sequence.num_useful) if can_chain else 0,
            forced=sequence.request.lookahead,
        )

    def _chains(self, chosen: list[tuple[Sequence, Choice]]) -> dict[int, Proposal]:
        """The model's chains by slot, made together as long as the longest and then cut; none if it fails."""
        if not chosen or self.eagle is None:
            return {}
        sequences, longest = [sequence for sequence, _ in chosen], max(choice.length for _, choice in chosen)
        started, rows = time.perf_counter(), {sequence: sequence.num_pending for sequence in sequences}
        try:
            chains = self.eagle.propose(sequences, longest)
        except RuntimeError as error:  # what is not finite, no memory left
            self._give_up(self.eagle, sequences, error)
            return {}
        seconds, behind = time.perf_counter() - started, sum(rows.values())
        self.lookahead.observe_chains(
            sequences=len(rows), length=longest, behind=behind, seconds=seconds, beside=self._beside(rows)
        )
        return {each.slot: chain.first(choice.length) for (each, choice), chain in zip(chosen, chains, strict=True)}

    def _give_up(self, eagle: EagleProposer, sequences: list[Sequence], error: RuntimeError) -> None:
        """Draft no more for these, or for those that the error is about: each may have read half of its rows."""
        self.faults[self.draft_version] += 1
        logger.error("A draft failed", extra={"version": self.draft_version, "reason": str(error)[:200]})
        for sequence in error.sequences if isinstance(error, NotFiniteError) else sequences:
            sequence.is_draftable = False
            eagle.forget(sequence)

    def _wish(self, sequence: Sequence) -> Drafter:
        return sequence.request.drafter or self._default

    def _observe(self, sequence: Sequence, start: int, aux: Tensor, last: Tensor) -> None:
        """Hand confirmed rows from position `start` on to the draft and to the payload."""
        sequence.keep(start, aux, last)
        if self.eagle is None or self._wish(sequence) not in _BY_MODEL:
            sequence.is_draftable = False  # the draft has not seen these rows and never will
        elif sequence.is_draftable:
            self.eagle.observe(sequence, aux)

    def _let_read(self, sequences: list[Sequence], read: Reading) -> None:
        """Let the draft read on for those of them that may draft."""
        able = [each for each in sequences if each.is_draftable]
        if self.eagle is None or not able:
            return
        started = time.perf_counter()
        try:
            rows = read(self.eagle, able)
            self.lookahead.observe_reading((time.perf_counter() - started) * self._beside(rows))
        except RuntimeError as error:
            self._give_up(self.eagle, able, error)

    def _may_leave(self, sequence: Sequence) -> bool:
        """Whether it may be left to lookups."""
        return self._wish(sequence) is Drafter.HYBRID and sequence.request.lookahead is None

    def _beside(self, rows: Mapping[Sequence, int]) -> float:
        """The share of those that may be left to lookups, in so many rows of each sequence."""
        return sum(num for each, num in rows.items() if self._may_leave(each)) / max(1, sum(rows.values()))

    def _record(
        self, sequence: Sequence, proposal: Proposal, verdict: VerifyResult, batch: int, duration_s: float
    ) -> None:
        is_model = proposal.drafter is Drafter.EAGLE3
        if proposal.ids and is_model:
            is_refused = verdict.accepted < len(proposal.ids)
            self.lookahead.observe_verdict(sequence.history, verdict.accepted, is_refused=is_refused)
        sequence.record(
            VerifyStep(
                start=sequence.num_output,
                accepted=verdict.accepted,
                draft_ids=tuple(proposal.ids),
                draft_log_probs=tuple(proposal.log_probs),
                target_log_probs=tuple(verdict.target_log_probs),
                batch_size=batch,
                duration_s=duration_s,
                drafter=proposal.drafter,
                draft_version=self.draft_version if is_model else 0,
            )
        )

    def _gain(self, sequence: Sequence, token_ids: list[int], logprobs: tuple[TokenLogprob, ...]) -> None:
        """Give the sequence its new tokens, and end it where they end it."""
        before = len(sequence.ids)
        if score := sequence.shadow.score(token_ids):
            self.lookahead.observe(sequence.history, score.kind, score.kept, is_refused=score.is_refused)
        if sequence.first_token_s is None:
            sequence.first_token_s = time.monotonic()
        reason = sequence.extend(token_ids, self.target.config.eos_token_ids)
        gained = sequence.ids[before:]
        if reason is None:
            sequence.emit(Delta(token_ids=tuple(gained), logprobs=logprobs))
        else:
            self._end(sequence, reason, gained, logprobs[: len(gained)])

    def _break_off(self, sequence: Sequence) -> None:
        """End a request that the target has no finite logits for, and wipe what it wrote: see `EagleProposer.forget`."""
        sequence.failure = Corrupt("the model's logits for this request are not finite")
        logger.error("The target's logits are not finite", extra={"position": sequence.num_computed_tokens})
        self._cache.wipe(sequence.slot)
        if self.eagle is not None:
            self.eagle.forget(sequence)
        self._end(sequence, FinishReason.CANCELLED, [])
        self._slots.forget(sequence.slot)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        gained: list[int],
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> None:
        """Send the last delta and free the slot."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        self._decoding.pop(sequence.slot, None)
        sequence.emit(Delta(token_ids=tuple(gained), logprobs=logprobs, finished=sequence.finished(reason)))
        if self._wish(sequence) in _BY_LOOKUP:
            self.lookups.remember(sequence)
        if sequence.slot >= 0:
            if reason is not FinishReason.CANCELLED:
                self._let_read([sequence], EagleProposer.catch_up)  # of use to the next one that begins alike
            self._slots.leave(sequence.tenant)
