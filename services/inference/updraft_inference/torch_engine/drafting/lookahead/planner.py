"""The state behind the choice: a running engine asks for a plan before each step and reports results after it."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from updraft_inference.engine import Drafter
from updraft_inference.torch_engine.drafting.lookahead.acceptance import AcceptanceTable, SequenceStats
from updraft_inference.torch_engine.drafting.lookahead.cost import ChainCost, CostTable
from updraft_inference.torch_engine.drafting.lookahead.policy import (
    DraftChoice,
    DraftOptions,
    StepCosts,
    StepPlan,
    choose,
)
from updraft_inference.torch_engine.drafting.lookahead.probe import DraftModelGate, ProbeSchedule
from updraft_inference.torch_engine.proposal import NO_MATCH, ProposalSource, chain_source

UNKNOWN = 8.0
"""Chains that a new draft model makes before anything is concluded from them."""
PROBE_STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRequest:
    """The drafts that are possible for one sequence of a step: `ngram` tokens that lookup found, or `chain` tokens by the draft
    model, mixed with lookup if there is a `match`. `forced`: make so many, whatever they cost."""

    stats: SequenceStats
    match: ProposalSource | None = None
    """How lookup found its tokens; None: nobody looked."""
    ngram: int = 0
    chain: int = 0
    forced: int | None = None

    @property
    def is_hybrid(self) -> bool:
        """The draft model competes with lookup alone."""
        return self.chain > 0 and self.match is not None


class LookaheadPlanner:
    """Chooses proposer and length for every sequence. `is_fixed`: always the longest drafts. Not thread-safe."""

    def __init__(self, cost: CostTable, *, is_fixed: bool = False) -> None:
        self.cost = cost
        self.gate = DraftModelGate()
        self.acceptance = AcceptanceTable()
        self.last = 0
        """The longest drafts of the last step."""
        self.is_fixed = is_fixed
        self._chains = ChainCost(cost)
        self._probes = _probe_schedules()
        self._num_probed = Counter[bool]()
        """By kind."""
        self._probed: dict[SequenceStats, float] = {}
        """Those that drafted in the last step only to be tried, and how many accepted drafts were expected."""

    def reset_model(self) -> None:
        """Another draft model is served: it begins with full chains."""
        self.acceptance.reset_chains()
        self.gate.reset()
        self._probes = _probe_schedules()

    def plan(self, requests: Sequence[DraftRequest]) -> list[DraftChoice]:
        """Choose as if no prompt were read in the same step: next to one, drafts would look cheap."""
        if not requests:
            return []
        forced = [self._forced(request) for request in requests]
        self._force_probe(requests, forced)
        options = [self._options(request, choice) for request, choice in zip(requests, forced, strict=True)]
        plan = choose(options, self._costs(options))
        self.last = max(choice.length for choice in plan.choices)
        self._record(requests, options, plan)
        return plan.choices

    def observe_chain(self, stats: SequenceStats, accepted: int, *, is_rejected: bool) -> None:
        """The result of the draft model's chain in the last step."""
        if accepted > self._probed.get(stats, math.inf):
            self._probes[stats.is_sampled].reset()
        self.acceptance.observe(stats, stats.chain, accepted, is_rejected=is_rejected)

    def observe_tokens(self, stats: SequenceStats, token_ids: list[int]) -> None:
        """A sequence got new tokens: score the n-gram proposal that waits for them."""
        score = stats.pending.score(token_ids)
        if score is not None:
            self.acceptance.observe(stats, score.source, score.accepted, is_rejected=score.is_rejected)

    def observe_step(self, *, batch: int, rows: int, num_prompt_rows: int, seconds: float) -> None:
        """A forward read `rows` rows: of `batch` sequences that decode, and `num_prompt_rows` of prompts."""
        if not num_prompt_rows:
            self.cost.observe(batch, rows, seconds)
        elif batch:
            self.cost.observe_mixed(rows, seconds)

    def observe_chains(self, *, sequences: int, length: int, behind: int, seconds: float) -> None:
        """The draft model drafted for so many sequences that were `behind` rows behind all together."""
        self._chains.observe(sequences=sequences, length=length, behind=behind, seconds=seconds)

    def drafting_cost(self, batch: int, chains: Sequence[int]) -> float:
        """Seconds that a step of `batch` sequences takes longer with chains of these lengths, as a share of one without."""
        seconds = self.cost.seconds(batch, batch + sum(chains)) + max(chains) * self._chains.token(len(chains))
        return seconds / self.cost.seconds(batch, batch) - 1.0

    def survival(self, drafter: Drafter, length: int) -> float:
        """See `LookaheadEstimates`. Called by other threads."""
        return self.acceptance.recent(drafter, length)

    def step_seconds(self, rows: int) -> float:
        """See `LookaheadEstimates`. Called by other threads."""
        return self.cost.curve.at(rows)

    def _forced(self, request: DraftRequest) -> DraftChoice | None:
        is_unknown = request.chain > 0 and self.acceptance.num_chains(is_sampled=request.stats.is_sampled) < UNKNOWN
        length = request.forced
        if length is None and (self.is_fixed or is_unknown):
            length = max(request.ngram, request.chain)
        if length is None:
            return None
        return _longest(request, at_most=length)

    def _force_probe(self, requests: Sequence[DraftRequest], forced: list[DraftChoice | None]) -> None:
        """Now and then one sequence of a kind drafts although nothing promises that it pays, so that acceptance and costs stay
        known."""
        self._probed = {}
        for is_sampled, probe in self._probes.items():
            able = [i for i, r in enumerate(requests) if r.stats.is_sampled is is_sampled and forced[i] is None]
            able = [i for i in able if requests[i].chain] or [i for i in able if requests[i].ngram]
            if able and probe.next():
                i = able[self._num_probed[is_sampled] // PROBE_STEPS % len(able)]
                self._num_probed[is_sampled] += 1
                forced[i] = _longest(requests[i])
                self._probed[requests[i].stats] = sum(self._options(requests[i]).chain)

    def _options(self, request: DraftRequest, forced: DraftChoice | None = None) -> DraftOptions:
        survival = self.acceptance.survival
        return DraftOptions(
            survival(request.stats, request.match or NO_MATCH, request.ngram),
            survival(request.stats, chain_source(request.match), request.chain),
            forced,
        )

    def _costs(self, options: Sequence[DraftOptions]) -> StepCosts:
        batch, token_s = len(options), cache(self._chains.token)
        most = sum(1 + max(1, len(o.ngram), len(o.chain)) for o in options)
        return StepCosts(self.cost.up_to(batch, most), lambda num, length: length * token_s(num))

    def _record(self, requests: Sequence[DraftRequest], options: Sequence[DraftOptions], plan: StepPlan) -> None:
        num_possible = num_chosen = 0
        can_chain = {request.stats.is_sampled for request in requests if request.chain}
        for request, option, choice in zip(requests, options, plan.choices, strict=True):
            is_chain, is_free = choice.drafter is Drafter.EAGLE3, option.forced is None
            request.stats.chain = chain_source(request.match)
            if choice.length:
                source = request.stats.chain if is_chain else request.match or NO_MATCH
                drafter = Drafter.HYBRID if is_chain and request.is_hybrid else choice.drafter
                self.acceptance.count(drafter, request.stats, source)
            if choice.length and is_free and (is_chain or request.stats.is_sampled not in can_chain):
                self._probes[request.stats.is_sampled].defer()
            num_possible += request.is_hybrid and is_free
            num_chosen += request.is_hybrid and is_free and is_chain
        if any(request.match is not None for request in requests) and self.gate.observe(num_possible, num_chosen):
            self.acceptance.reset_chains()


def _probe_schedules() -> dict[bool, ProbeSchedule]:
    """One for greedy and one for sampled requests: the acceptance of one kind says nothing of the other."""
    return {is_sampled: ProbeSchedule(PROBE_STEPS) for is_sampled in (False, True)}


def _longest(request: DraftRequest, at_most: int | None = None) -> DraftChoice:
    """A chain if the draft model can make one, because what lookup found is mixed into it."""
    drafter, possible = (Drafter.EAGLE3, request.chain) if request.chain else (Drafter.NGRAM, request.ngram)
    length = possible if at_most is None else min(at_most, possible)
    return DraftChoice(drafter, length) if length else DraftChoice()
