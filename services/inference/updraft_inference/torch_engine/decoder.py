"""The synchronous heart of the engine: one `step` is admit, prefill, propose, verify.

Continuous batching: requests join and leave between steps. A long prompt is read a chunk at a time between decode steps, so
running streams never wait for more than one chunk.
"""

import logging
import time
from collections import Counter, deque
from dataclasses import dataclass

import torch
from torch import Tensor

from updraft_inference.agent.lookahead import Lookahead
from updraft_inference.engine.port import Delta, Drafter, FinishReason, VerifyStep
from updraft_inference.torch_engine.eagle import MAX_ROWS_TOGETHER, EagleDrafter
from updraft_inference.torch_engine.kv_cache import CacheShape, SlotCache
from updraft_inference.torch_engine.sequence import Proposal, Sequence
from updraft_inference.torch_engine.target import Forward, Target
from updraft_inference.torch_engine.verify import Verdict, judge

logger = logging.getLogger(__name__)

PREFILL_CHUNK = 256
"""Prompt tokens a forward: about 0.2 s of a two-core CPU on a 135 M model, the longest a stream waits for a newcomer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes that are fixed while the engine runs. `max_context` counts prompt and output tokens of a request."""

    num_slots: int
    max_context: int
    max_lookahead: int

    @property
    def num_positions(self) -> int:
        """Cache positions a slot: drafts, and rows padded to a batch, may reach beyond the context."""
        return self.max_context + max(self.max_lookahead + 1, MAX_ROWS_TOGETHER)


class Decoder:
    """Runs requests to their end. Not thread-safe; the engine thread owns it and whatever it holds."""

    def __init__(self, target: Target, limits: Limits, *, default: Drafter, lookahead: Lookahead) -> None:
        c = target.config
        self.target = target
        self.limits = limits
        self.eagle: EagleDrafter | None = None
        self.draft_version = 0
        self.faults: Counter[int] = Counter()
        """By draft version; read by other threads."""
        self._default = default
        self._lookahead = lookahead
        shape = CacheShape(
            num_layers=c.num_layers,
            num_slots=limits.num_slots,
            num_positions=limits.num_positions,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
        )
        self._cache = SlotCache(shape, like=target.embedding)
        self._free = list(range(limits.num_slots))
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
        return sum(s.num_read for s in (*self._prefilling, *self._decoding.values()))

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
        """Admit what fits, read one chunk of one prompt, then decode all running requests by one verify step."""
        self._admit()
        if self._prefilling:
            self._prefill(self._prefilling[0])
        if self._decoding:
            self._decode([self._decoding[slot] for slot in sorted(self._decoding)])

    def _all(self) -> list[Sequence]:
        return [*self._waiting, *self._prefilling, *self._decoding.values()]

    def _admit(self) -> None:
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop(0)
            self._prefilling.append(sequence)

    def _prefill(self, sequence: Sequence) -> None:
        start = sequence.num_read
        ids = sequence.ids[start : start + PREFILL_CHUNK]
        forward = self._forward([sequence], [ids])
        sequence.num_read += len(ids)
        self._observe(sequence, start, forward.aux[0], forward.last[0])
        if sequence.is_prefilling:
            return
        self._prefilling.popleft()
        self._decoding[sequence.slot] = sequence
        logits = self.target.logits(forward.last[:, -1:])
        verdict = judge([sequence], [Proposal()], logits)[0]
        self._gain(sequence, [verdict.next_id])

    def _decode(self, sequences: list[Sequence]) -> None:
        started = time.perf_counter()
        proposals = self._propose(sequences)
        drafted = time.perf_counter()
        width = 1 + max(len(p.ids) for p in proposals)
        rows = [[s.ids[-1], *p.ids] for s, p in zip(sequences, proposals, strict=True)]
        forward = self._forward(sequences, [row + row[-1:] * (width - len(row)) for row in rows])
        verdicts = judge(sequences, proposals, self.target.logits(forward.last))
        now = time.perf_counter()
        self._lookahead.observe_cost(
            batch=len(sequences), width=width, verify_s=now - drafted, draft_s=drafted - started
        )
        for i, (sequence, proposal, verdict) in enumerate(zip(sequences, proposals, verdicts, strict=True)):
            kept = verdict.accepted + 1
            start = sequence.num_read
            sequence.num_read += kept
            self._record(sequence, proposal, verdict, len(sequences), now - started)
            self._observe(sequence, start, forward.aux[i, :kept], forward.last[i, :kept])
            # Rows after the rejection of a lookup would say nothing about the draft.
            if proposal.drafter is Drafter.EAGLE3 and sequence.request.capture.counterfactual_rows:
                rejected = slice(kept, len(proposal.ids) + 1)
                sequence.keep_rejected(forward.aux[i, rejected], forward.last[i, rejected])
            self._gain(sequence, [*proposal.ids[: verdict.accepted], verdict.next_id])

    def _forward(self, sequences: list[Sequence], ids: list[list[int]]) -> Forward:
        slots, starts = [s.slot for s in sequences], [s.num_read for s in sequences]
        batch = self._cache.batch(slots, starts, len(ids[0]))
        return self.target.forward(torch.tensor(ids, device=self.target.embedding.device), batch, self._cache)

    def _propose(self, sequences: list[Sequence]) -> list[Proposal]:
        """Each sequence's drafts by its own drafter; those of EAGLE in one batch."""
        k = self._lookahead.choose(batch=len(sequences))
        proposals = {s.slot: Proposal() for s in sequences}
        by_model: list[Sequence] = []
        for sequence in sequences:
            drafter = self._drafter(sequence)
            if drafter is Drafter.EAGLE3 and self._width(sequence, k) > 0:
                by_model.append(sequence)
            elif drafter is Drafter.NGRAM:
                ids = sequence.index.propose(sequence.ids, self._width(sequence, self.limits.max_lookahead))
                proposals[sequence.slot] = Proposal(drafter=drafter, ids=ids, log_probs=[0.0] * len(ids))
        if by_model and self.eagle is not None:
            chains = self._draft(self.eagle, by_model, max(self._width(s, k) for s in by_model))
            for sequence, chain in zip(by_model, chains, strict=True):
                proposals[sequence.slot] = _cut(chain, self._width(sequence, k))
        return [proposals[s.slot] for s in sequences]

    def _draft(self, eagle: EagleDrafter, sequences: list[Sequence], k: int) -> list[Proposal]:
        """Their chains. A draft that fails costs these sequences their drafts, not their requests."""
        try:
            return eagle.propose(sequences, k)
        except RuntimeError as error:  # torch's: a distribution that is not one, no memory left
            self.faults[self.draft_version] += 1
            logger.error("A draft failed", extra={"version": self.draft_version, "reason": str(error)[:200]})
            for sequence in sequences:
                sequence.is_draftable = False  # it may have read half of its rows
            return [Proposal() for _ in sequences]

    def _drafter(self, sequence: Sequence) -> Drafter:
        wish = sequence.request.drafter or self._default
        if wish is Drafter.EAGLE3 and (self.eagle is None or not sequence.is_draftable):
            return Drafter.NONE
        return wish

    def _width(self, sequence: Sequence, k: int) -> int:
        """Drafts worth making: no more than the request may still emit before its last token."""
        wished = sequence.request.lookahead
        return max(0, min(k if wished is None else wished, self.limits.max_lookahead, sequence.num_left - 1))

    def _observe(self, sequence: Sequence, start: int, aux: Tensor, last: Tensor) -> None:
        """Hand confirmed rows from position `start` on to the draft and to the payload."""
        sequence.keep(start, aux, last)
        wants_eagle = (sequence.request.drafter or self._default) is Drafter.EAGLE3
        if self.eagle is None or not wants_eagle:
            sequence.is_draftable = False  # the draft has not seen these rows and never will
        elif sequence.is_draftable:
            self.eagle.observe(sequence, aux)

    def _record(self, sequence: Sequence, proposal: Proposal, verdict: Verdict, batch: int, duration_s: float) -> None:
        is_model = proposal.drafter is Drafter.EAGLE3
        if proposal.ids and is_model:
            self._lookahead.observe_acceptance(len(proposal.ids), verdict.accepted)
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

    def _gain(self, sequence: Sequence, token_ids: list[int]) -> None:
        """Give the sequence its new tokens, and end it where they end it."""
        before = len(sequence.ids)
        if sequence.first_token_s is None:
            sequence.first_token_s = time.monotonic()
        reason = sequence.extend(token_ids, self.target.config.eos_token_ids)
        gained = sequence.ids[before:]
        if reason is None:
            sequence.emit(Delta(token_ids=tuple(gained)))
        else:
            self._end(sequence, reason, gained)

    def _end(self, sequence: Sequence, reason: FinishReason, gained: list[int]) -> None:
        """Free the slot and send the last delta."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        self._decoding.pop(sequence.slot, None)
        if sequence.slot >= 0:
            self._free.append(sequence.slot)
            self._free.sort()  # low slots first keeps batches dense, and dense batches read the cache in place
        sequence.emit(Delta(token_ids=tuple(gained), finished=sequence.finished(reason)))


def _cut(proposal: Proposal, width: int) -> Proposal:
    """The first `width` drafts of a chain."""
    q = None if proposal.q is None else proposal.q[:width]
    return Proposal(drafter=proposal.drafter, ids=proposal.ids[:width], log_probs=proposal.log_probs[:width], q=q)
