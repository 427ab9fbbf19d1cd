"""One running request: its tokens, how far target and draft have read them, and the rows that capture keeps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from updraft_chassis.errors import UpdraftError
from updraft_inference.engine import (
    Counterfactual,
    Delta,
    FinishedRequest,
    FinishReason,
    GenerationRequest,
    HiddenStates,
    VerifyStep,
)

Emit = Callable[[Delta], None]


class OutputConstraint(Protocol):
    """Restricts a request's output; see `sampling.grammar.Grammar`."""

    @property
    def failure(self) -> UpdraftError | None:
        """Why the output cannot go on; the request then ends."""
        ...

    def allowed(self, output_ids: list[int], draft_ids: list[int]) -> Tensor:
        """Tokens that may stand at each verified row, bool [len(draft_ids) + 1, V], on the CPU."""
        ...


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class Sequence:
    """One request in one slot.

    Invariant while decoding: the target has read all tokens but the last (`num_computed_tokens == len(ids) - 1`). The draft's
    cache plus `pending_aux` covers the same rows, unless the draft fell behind (`is_draftable` is then false for good).
    """

    request: GenerationRequest
    emit: Emit
    slot: int = -1
    ids: list[int]
    num_computed_tokens: int = 0
    """Positions in the target's cache."""
    num_cached: int = 0
    """Those of them that were copied from another request's."""
    num_computed_draft_tokens: int = 0
    """Positions in the draft's cache."""
    has_old_draft_rows: bool = False
    """Some of those were computed with the draft's weights before a swap."""
    pending_aux: list[Tensor] = field(default_factory=list)
    """Auxiliary states [rows, A] that the draft has not read yet, in order."""
    is_draftable: bool = True
    generator: torch.Generator | None = None
    """None: greedy."""
    drafted_noise: dict[int, Tensor] = field(default_factory=dict)
    """Noise of seeded sampling by position, from drafting a token there until one is decided. Both need the same, and it takes
    as long as the rest of a draft token. For each drafted token four bytes per word of the target's vocabulary."""
    grammar: OutputConstraint | None = None
    failure: UpdraftError | None = None
    """Why the engine ended the request early."""
    steps: list[VerifyStep] = field(default_factory=list)
    submitted_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    _aux: list[Tensor] = field(default_factory=list)
    _last: list[Tensor] = field(default_factory=list)
    _first_kept: int = 0
    _rejected: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    """Index of the verify step, and its rows [n, A] and [n, D]."""

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def is_prefilling(self) -> bool:
        """The target has not read the whole prompt."""
        return self.num_computed_tokens < self.num_prompt

    @property
    def num_output(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that may still be generated."""
        return self.request.max_tokens - self.num_output

    @property
    def num_useful(self) -> int:
        """Drafts that may be accepted: a step always yields one more token than drafts."""
        return max(0, self.num_left - 1)

    @property
    def num_pending(self) -> int:
        """Rows that the draft has not read yet."""
        return sum(map(len, self.pending_aux))

    @property
    def changes_logits(self) -> bool:
        """The request samples from other logits than the target's own."""
        sampling = self.request.sampling
        return self.grammar is not None or sampling.has_penalties or bool(sampling.logit_bias)

    def keep(self, position: int, aux_RA: Tensor, last_RD: Tensor) -> None:
        """Keep rows from `position` on for the payload, if the request is captured with one."""
        capture = self.request.capture
        if not capture.payload:
            return
        skip = max(0, self.num_prompt - capture.prompt_rows - position)
        if skip >= len(aux_RA):
            return
        if not self._aux:
            self._first_kept = position + skip
        self._aux.append(aux_RA[skip:].clone())
        self._last.append(last_RD[skip:].clone())

    def keep_rejected(self, aux_RA: Tensor, last_RD: Tensor) -> None:
        """Keep rows that read the last step's rejected draft tokens, as many as the request captures."""
        n = self.request.capture.counterfactual_rows
        if self.request.capture.payload and len(aux_RA):
            self._rejected.append((len(self.steps) - 1, aux_RA[:n].clone(), last_RD[:n].clone()))

    def extend(self, token_ids: list[int], eos: frozenset[int]) -> FinishReason | None:
        """Append tokens up to the end of the request. Returns why it ended, or None. Emits nothing."""
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
        """The result of this request, which ends now."""
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
            num_cached=self.num_cached,
        )

    def _counterfactuals(self) -> tuple[Counterfactual, ...]:
        """On the CPU, except those of a step whose accepted draft tokens ended the request before its rejected one."""
        ends = [step.start + step.accepted for step in self.steps]
        kept = [rows for rows in self._rejected if ends[rows[0]] < self.num_output]
        if not kept:
            return ()
        steps, auxes, lasts = zip(*kept, strict=True)
        sizes = [len(rows) for rows in auxes]
        aux = torch.split(torch.cat(auxes).cpu(), sizes)
        last = torch.split(torch.cat(lasts).cpu(), sizes)
        return tuple(Counterfactual(step=s, aux=a, teacher=h) for s, a, h in zip(steps, aux, last, strict=True))
