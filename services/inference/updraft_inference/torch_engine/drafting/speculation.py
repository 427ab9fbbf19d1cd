"""Speculation for the running sequences: who proposes, what is proposed, and what the results say about both."""

import logging
import random
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from updraft_inference.engine import Drafter
from updraft_inference.torch_engine.drafting.eagle import EagleProposer, NotFiniteError
from updraft_inference.torch_engine.drafting.lookahead.acceptance import SequenceStats
from updraft_inference.torch_engine.drafting.lookahead.planner import DraftRequest, LookaheadPlanner
from updraft_inference.torch_engine.drafting.lookahead.policy import DraftChoice
from updraft_inference.torch_engine.drafting.mixture import Chooser, Mixture
from updraft_inference.torch_engine.drafting.ngram import NgramProposer
from updraft_inference.torch_engine.model.limits import Limits
from updraft_inference.torch_engine.proposal import Proposal
from updraft_inference.torch_engine.sequence import Sequence

logger = logging.getLogger(__name__)

_BY_MODEL = frozenset({Drafter.EAGLE3, Drafter.HYBRID})
_BY_NGRAM = frozenset({Drafter.NGRAM, Drafter.HYBRID})


class EvidenceBudget(NamedTuple):
    """Limits of the steps that are evidence about the draft: their share of all steps, and the time that they may add to steps
    without drafts, as a share of it."""

    steps: float
    seconds: float


USUAL, COMPARING = EvidenceBudget(1 / 32, 0.01), EvidenceBudget(1 / 8, 0.05)
"""Usually, and while the registry compares drafts. In steps drawn by chance, the draft model drafts alone for every `hybrid`
request without a lookahead of its own, as many tokens as it may. Only these are evidence about a draft. Elsewhere the planner
lets it draft where it is good, and a mixed chain has its tokens where it was trusted; both flatter the worse draft. They also
show whether drawn tokens would be accepted where the model is not trusted."""


class Speculation:
    """Owns the proposers and the planner. Not thread-safe; the engine thread owns it."""

    def __init__(self, limits: Limits, planner: LookaheadPlanner, *, default: Drafter) -> None:
        self.planner = planner
        self.ngram = NgramProposer(limits.num_remembered)
        self.chooser = Chooser()
        self.eagle: EagleProposer | None = None
        self.draft_version = 0
        self.is_comparing = False
        """The registry compares drafts. Set by other threads."""
        self.faults: Counter[int] = Counter()
        """Steps in which drafting failed, by draft version; read by other threads."""
        self._limits = limits
        self._default = default
        self._random = random.Random(0)
        self._stats: WeakKeyDictionary[Sequence, SequenceStats] = WeakKeyDictionary()

    def install(self, eagle: EagleProposer | None, version: int, sequences: Iterable[Sequence]) -> None:
        """Draft with another network from now on, or with none. It has read nothing of `sequences`."""
        self.eagle = eagle
        for sequence in sequences:
            sequence.is_draftable = sequence.num_computed_tokens == 0
            sequence.num_computed_draft_tokens = 0
        self.renew(version)

    def renew(self, version: int) -> None:
        """The network has other weights."""
        self.draft_version = version
        self.planner.reset_model()
        self.chooser.reset_model()

    def wants_model(self, sequence: Sequence) -> bool:
        """Whether the draft model reads a request that begins now."""
        if self.eagle is None or self._drafter(sequence) not in _BY_MODEL:
            return False
        return not self._is_free_hybrid(sequence) or self.planner.gate.is_open or self.is_comparing

    def is_free(self, sequences: list[Sequence]) -> bool:
        """Whether it is left to the engine if these requests speculate, and at least one can."""
        if self.planner.is_fixed or any(sequence.request.lookahead is not None for sequence in sequences):
            return False
        able = _BY_NGRAM if self.eagle is None else _BY_NGRAM | _BY_MODEL
        return self._limits.max_lookahead > 0 and any(self._drafter(sequence) in able for sequence in sequences)

    def draw_alone(self, sequences: list[Sequence]) -> frozenset[Sequence]:
        """By chance, those for which the draft model drafts alone in this step: all `hybrid` requests that it has read
        and that leave the lookahead to the engine."""
        budget = COMPARING if self.is_comparing else USUAL
        if self._random.random() >= budget.steps:
            return frozenset()
        chains = {s: self._longest_chain(s) for s in sequences if self._is_free_hybrid(s)}
        chains = {s: length for s, length in chains.items() if length}
        if not chains:
            return frozenset()
        seconds = budget.steps * self.planner.drafting_cost(len(sequences), list(chains.values()))
        return frozenset(chains) if self._random.random() * seconds < budget.seconds else frozenset()

    def propose(self, sequences: list[Sequence], alone: frozenset[Sequence] = frozenset()) -> list[Proposal]:
        """Drafts for each sequence, ordered by slot; all chains of the draft model are made in one batch. For those in `alone`
        it drafts in any case, unmixed."""
        if not sequences:
            return []
        matches = self._match(sequences)
        requests = [self._request(s, matches.get(s), is_alone=s in alone) for s in sequences]
        choices = dict(zip(sequences, self.planner.plan(requests), strict=True))
        chosen = {s: choice for s, choice in choices.items() if choice.drafter is Drafter.EAGLE3}
        proposals = self._draft(chosen, alone)
        for sequence, choice in choices.items():
            if choice.drafter is Drafter.NGRAM:
                proposals[sequence] = matches[sequence].first(choice.length)
        return [proposals.get(sequence, Proposal()) for sequence in sequences]

    def keep_up(self, sequences: list[Sequence]) -> None:
        """Background work of a step."""
        self.ngram.keep_up()
        self._update_draft_cache([sequence for sequence in sequences if sequence.is_draftable])

    def observe(self, sequence: Sequence, aux_RA: Tensor) -> None:
        """The target has accepted positions with these auxiliary states."""
        if self.eagle is None or self._drafter(sequence) not in _BY_MODEL:
            sequence.is_draftable = False  # the draft has not read these rows and never will
        elif sequence.is_draftable:
            self.eagle.observe(sequence, aux_RA)

    def observe_tokens(self, sequence: Sequence, token_ids: list[int]) -> None:
        """The sequence got new tokens."""
        self.planner.observe_tokens(self._stats_of(sequence), token_ids)

    def observe_verification(self, sequence: Sequence, proposal: Proposal, accepted: int, bonus_id: int) -> None:
        """The target accepted the first `accepted` tokens of a proposal, and has `bonus_id` after them."""
        self.chooser.learn(proposal, accepted, bonus_id)
        # For a hybrid request, the planner chooses between lookup and mixed chains.
        is_alone_by_chance = proposal.drafter is not self._drafter(sequence)
        if proposal.ids and proposal.is_chain and not is_alone_by_chance:
            is_rejected = accepted < len(proposal.ids)
            self.planner.observe_chain(self._stats_of(sequence), accepted, is_rejected=is_rejected)

    def finish(self, sequence: Sequence, *, is_cancelled: bool) -> None:
        """The request has ended."""
        if self._drafter(sequence) in _BY_NGRAM:
            self.ngram.finish(sequence)
        if self.eagle is not None and sequence.slot >= 0 and sequence.is_draftable and not is_cancelled:
            self._update_draft_cache([sequence], is_finished=True)

    def forget(self, sequence: Sequence) -> None:
        """Drop what the draft holds of a sequence."""
        if self.eagle is not None:
            self.eagle.forget(sequence)

    def _match(self, sequences: list[Sequence]) -> dict[Sequence, Proposal]:
        """N-gram proposals of the sequences that want them. They cost nothing before they are verified."""
        most = self._limits.max_lookup if self._limits.max_lookahead else 0
        matches = {
            sequence: self.ngram.propose(sequence, most).first(min(most, sequence.num_useful))
            for sequence in sequences
            if self._drafter(sequence) in _BY_NGRAM
        }
        for sequence, match in matches.items():
            self._stats_of(sequence).pending.watch(match.ids, match.source)
        return matches

    def _request(self, sequence: Sequence, match: Proposal | None, *, is_alone: bool) -> DraftRequest:
        chain = self._longest_chain(sequence)
        return DraftRequest(
            stats=self._stats_of(sequence),
            match=None if match is None else match.source,
            ngram=0 if match is None else len(match.ids),
            chain=chain,
            forced=chain if is_alone else sequence.request.lookahead,
        )

    def _longest_chain(self, sequence: Sequence) -> int:
        """Tokens that the draft model can draft, at most."""
        can_chain = self.eagle is not None and sequence.is_draftable and self._drafter(sequence) in _BY_MODEL
        return min(self._limits.max_lookahead, sequence.num_useful) if can_chain else 0

    def _draft(self, choices: dict[Sequence, DraftChoice], alone: frozenset[Sequence]) -> dict[Sequence, Proposal]:
        """The model's chains, made as long as the longest one and then cut; none if the model fails."""
        if not choices or self.eagle is None:
            return {}
        sequences, longest = list(choices), max(choice.length for choice in choices.values())
        started, behind = time.perf_counter(), sum(sequence.num_pending for sequence in sequences)
        try:
            chains = self.eagle.propose(sequences, longest, self._mixture(sequences, alone))
        except RuntimeError as error:  # numbers that are not finite, no memory left
            self._give_up(self.eagle, sequences, error)
            return {}
        self.planner.observe_chains(
            sequences=len(sequences),
            length=longest,
            behind=behind,
            seconds=time.perf_counter() - started,
        )
        return {s: chain.first(choices[s].length) for s, chain in zip(sequences, chains, strict=True)}

    def _mixture(self, sequences: list[Sequence], alone: frozenset[Sequence]) -> Mixture:
        """Lookups for hybrid requests."""
        lookups = {s: partial(self.ngram.offers, s) for s in sequences if self._drafter(s) is Drafter.HYBRID}
        return Mixture(self.chooser, lookups, alone)

    def _update_draft_cache(self, sequences: list[Sequence], *, is_finished: bool = False) -> None:
        """Let the draft read accepted positions."""
        if self.eagle is None or not sequences:
            return
        try:
            if is_finished:
                self.eagle.finish(sequences[0])
            else:
                self.eagle.keep_up(sequences)
        except RuntimeError as error:
            self._give_up(self.eagle, sequences, error)

    def _give_up(self, eagle: EagleProposer, sequences: list[Sequence], error: RuntimeError) -> None:
        """Draft no more for these, or for those that the error names, because each may have read half of its rows."""
        self.faults[self.draft_version] += 1
        logger.error("Drafting failed", extra={"version": self.draft_version, "reason": str(error)[:200]})
        for sequence in error.sequences if isinstance(error, NotFiniteError) else sequences:
            sequence.is_draftable = False
            eagle.forget(sequence)

    def _drafter(self, sequence: Sequence) -> Drafter:
        return sequence.request.drafter or self._default

    def _is_free_hybrid(self, sequence: Sequence) -> bool:
        """Whether the engine decides when the draft model drafts for the sequence, and how far."""
        return self._drafter(sequence) is Drafter.HYBRID and sequence.request.lookahead is None

    def _stats_of(self, sequence: Sequence) -> SequenceStats:
        return self._stats.setdefault(sequence, SequenceStats(is_sampled=sequence.generator is not None))
