"""The state of one running request: tokens so far, how far target and draft have read them, what capture keeps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from updraft_chassis.errors import UpdraftError
from updraft_inference.engine import (
    Counterfactual,
    Delta,
    Drafter,
    FinishedRequest,
    FinishReason,
    GenerationRequest,
    HiddenStates,
    VerifyStep,
)
from updraft_inference.torch_engine.drafting.lookahead.policy import Record
from updraft_inference.torch_engine.drafting.lookahead.shadow import Shadow
from updraft_inference.torch_engine.drafting.ngram_index import NgramIndex
from updraft_inference.torch_engine.sampling.grammar import Grammar
from updraft_inference.torch_engine.scheduler.prefix_cache import CachedPrefix

Emit = Callable[[Delta], None]


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One request in one slot.

    Invariant while decoding: the target has read all tokens but the last (`num_computed_tokens == len(ids) - 1`), and the
    draft's cache plus `pending_aux` covers the same rows, unless the draft fell behind (`is_draftable` is then false for good).
    """

    request: GenerationRequest
    emit: Emit
    slot: int = -1
    ids: list[int]
    num_computed_tokens: int = 0
    """Positions in the target's cache."""
    num_computed_draft_tokens: int = 0
    """Positions in the draft's cache."""
    has_old_draft_rows: bool = False
    """Some of them are of weights that the draft had before a swap."""
    pending_aux: list[Tensor] = field(default_factory=list)
    """Auxiliary states [rows, A] that the draft has not read yet, in order."""
    is_draftable: bool = True
    generator: torch.Generator | None = None
    grammar: Grammar | None = None
    failure: UpdraftError | None = None
    """Why it was ended by the engine, where that is nobody's wish."""
    steps: list[VerifyStep] = field(default_factory=list)
    index: NgramIndex = field(default_factory=NgramIndex)
    history: Record = field(default_factory=Record)
    shadow: Shadow = field(default_factory=Shadow)
    submitted_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    _aux: list[Tensor] = field(default_factory=list)
    _last: list[Tensor] = field(default_factory=list)
    _first_kept: int = 0
    _rejected: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    """Verify step, and its rows [n, A] and [n, D]."""

    @property
    def num_prompt(self) -> int:
        """Prompt tokens."""
        return len(self.request.prompt_ids)

    @property
    def is_prefilling(self) -> bool:
        """The target has not read the whole prompt."""
        return self.num_computed_tokens < self.num_prompt

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.ids) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that may still be generated."""
        return self.request.max_tokens - self.num_output

    @property
    def num_useful(self) -> int:
        """Drafts that may be kept: a step always gives one token beside them."""
        return max(0, self.num_left - 1)

    @property
    def is_greedy(self) -> bool:
        """No randomness in this request."""
        return self.request.sampling.temperature <= 0

    @property
    def changes_logits(self) -> bool:
        """The request chooses from other logits than the target's own."""
        sampling = self.request.sampling
        return self.grammar is not None or sampling.has_penalties or bool(sampling.logit_bias)

    def keep(self, position: int, aux: Tensor, last: Tensor) -> None:
        """Keep rows [rows, A] and [rows, D] from `position` on for the payload, if the request is captured with one."""
        wish = self.request.capture
        if not wish.payload:
            return
        skip = max(0, self.num_prompt - wish.prompt_rows - position)
        if skip >= len(aux):
            return
        if not self._aux:
            self._first_kept = position + skip
        self._aux.append(aux[skip:].clone())
        self._last.append(last[skip:].clone())

    def keep_rejected(self, aux: Tensor, last: Tensor) -> None:
        """Keep what the request wants of the rows [rows, A] and [rows, D] that read the last step's rejected drafts."""
        wish = self.request.capture
        if wish.payload and len(aux):
            n = wish.counterfactual_rows
            self._rejected.append((len(self.steps) - 1, aux[:n].clone(), last[:n].clone()))

    @property
    def num_pending(self) -> int:
        """Rows that the draft has not read yet."""
        return sum(map(len, self.pending_aux))

    @property
    def tenant(self) -> CachedPrefix:
        """What its slot holds for others."""
        num_computed_draft_tokens = 0 if self.has_old_draft_rows else self.num_computed_draft_tokens
        return CachedPrefix(
            slot=self.slot,
            client=self.request.client,
            ids=self.ids,
            num_computed_tokens=self.num_computed_tokens,
            num_computed_draft_tokens=num_computed_draft_tokens,
        )

    def extend(self, token_ids: list[int], eos: frozenset[int]) -> FinishReason | None:
        """Append new tokens up to the end of the request; return why it ended, or None. Emits nothing."""
        if self.grammar is not None and self.grammar.failure is not None:
            self.failure = self.grammar.failure
            return FinishReason.CANCELLED
        for token in token_ids:
            self.ids.append(token)
            if token in eos and not self.request.ignore_eos:
                return FinishReason.STOP
            if self.num_left <= 0:
                return FinishReason.LENGTH
        return None

    def finished(self, reason: FinishReason) -> FinishedRequest:
        """The record of this request, ended for `reason` now."""
        now = time.monotonic()
        hidden = None
        if self._aux:
            hidden = HiddenStates(
                first_position=self._first_kept,
                aux=torch.cat(self._aux).cpu(),
                teacher=torch.cat(self._last).cpu(),
                counterfactuals=self._counterfactuals(),
            )
        return FinishedRequest(
            request=self.request,
            output_ids=tuple(self.ids[self.num_prompt :]),
            steps=tuple(self.steps),
            reason=reason,
            time_to_first_token_s=(self.first_token_s or now) - self.submitted_s,
            duration_s=now - self.submitted_s,
            hidden=hidden,
        )

    def record(self, step: VerifyStep) -> None:
        """Remember a verify step."""
        self.steps.append(step)

    def _counterfactuals(self) -> tuple[Counterfactual, ...]:
        """On the CPU; without that of a step whose kept drafts ended the request before its rejected one."""
        ends = [step.start + step.accepted for step in self.steps]
        kept = [one for one in self._rejected if ends[one[0]] < self.num_output]
        if not kept:
            return ()
        steps, auxes, lasts = zip(*kept, strict=True)
        sizes = [len(rows) for rows in auxes]
        aux = torch.split(torch.cat(auxes).cpu(), sizes)
        last = torch.split(torch.cat(lasts).cpu(), sizes)
        return tuple(Counterfactual(step=s, aux=a, teacher=h) for s, a, h in zip(steps, aux, last, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a drafter proposes for one sequence. `q` is the distribution it drew from, [k, V], or None for point masses."""

    drafter: Drafter = Drafter.NONE
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    q: Tensor | None = None

    def first(self, width: int) -> "Proposal":
        """Its first `width` drafts."""
        q = None if self.q is None else self.q[:width]
        return Proposal(drafter=self.drafter, ids=self.ids[:width], log_probs=self.log_probs[:width], q=q)
