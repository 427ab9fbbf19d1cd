"""Which proposer drafts for each sequence, and how many tokens: a pure choice by expected tokens per second.

A step yields one token per sequence plus the survival of every draft that it verifies (Leviathan et al. 2023, equation 1,
without the assumption that all drafts are accepted equally often). The rule has two parts. Each sequence takes n-gram lookup,
which is free, or a chain of the draft model, whichever promises more accepted tokens for what it costs. Then rows go to the
likeliest drafts of all sequences for as long as the step yields more tokens per second; survival never rises along a proposal,
so taking the likeliest first is optimal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from updraft_inference.engine import Drafter

MARGIN = 1.05
"""Speculation has to promise so much more than none, and the draft model so much more than n-gram lookup alone, because the
best of many noisy promises is more likely too high than too low."""


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """`length` drafts by `drafter`; none if it is 0."""

    drafter: Drafter = Drafter.NONE
    length: int = 0


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """The possible proposals for one sequence; entry i is the probability that the first i + 1 draft tokens are accepted."""

    ngram: Sequence[float] = ()
    chain: Sequence[float] = ()
    forced: DraftChoice | None = None
    """The choice that is made whatever it costs."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """`verify[r]`: seconds to verify r rows, up to all that may be drafted. `chain(num, length)`: seconds for the draft model
    to draft chains of `length` tokens for `num` sequences."""

    verify: Sequence[float]
    chain: Callable[[int, int], float]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A choice per sequence, and the tokens per second that the step should yield."""

    choices: list[DraftChoice]
    speed: float


def choose(options: Sequence[DraftOptions], costs: StepCosts) -> StepPlan:
    """Choose for every sequence of a step, at least one."""
    num = len(options)
    plain = _plan([DraftOptions(o.ngram, o.chain, o.forced or DraftChoice()) for o in options], costs, _Prices())
    if not _can_reach(MARGIN * plain.speed, options, costs):
        return plain
    row_tokens = MARGIN * plain.speed * (costs.verify[2 * num] - costs.verify[num]) / num
    best = plain
    lookup = _plan(options, costs, _Prices(row_tokens))
    if lookup.speed > MARGIN * plain.speed:
        best = lookup
    longest = max(len(o.chain) for o in options if o.forced is None) if any(o.forced is None for o in options) else 0
    chained = [
        _plan(options, costs, _Prices(row_tokens, n, MARGIN * plain.speed * costs.chain(num, n) / num))
        for n in range(1, longest + 1)
    ]
    fastest = max(chained, key=lambda plan: plan.speed, default=best)
    return fastest if fastest.speed > MARGIN * best.speed else best


def _can_reach(speed: float, options: Sequence[DraftOptions], costs: StepCosts) -> bool:
    """Whether more than this speed is possible at all: with the likelier of both proposers at each place, and chains that cost
    nothing. Where drafts are seldom accepted this is nearly always false, and then saves most of the time of a choice."""
    if any(option.forced is not None for option in options):
        return True
    likelier = (max(pair) for o in options for pair in zip_longest(o.ngram, o.chain, fillvalue=0.0))
    tokens: float = len(options)
    for rows, alive in enumerate(sorted(likelier, reverse=True), start=len(options) + 1):
        tokens += alive
        if tokens > speed * costs.verify[rows]:
            return True
    return False


class _Prices(NamedTuple):
    """Tokens that a plan without drafts yields in the time of a row, and of a sequence's share in chains of `max_chain` tokens.
    A draft has to promise more."""

    row_tokens: float = 0.0
    max_chain: int = 0
    chain_tokens: float = 0.0


class _Draft(NamedTuple):
    """The proposer of one sequence. `least`: drafts that it makes in any case; `is_free`: it may make more."""

    drafter: Drafter
    survival: Sequence[float]
    least: int = 0
    is_free: bool = True


def _plan(options: Sequence[DraftOptions], costs: StepCosts, prices: _Prices) -> StepPlan:
    """The fastest plan with chains of at most `prices.max_chain` tokens."""
    drafts = [_draft(option, prices) for option in options]
    lengths = [draft.least for draft in drafts]
    pool = sorted(
        ((alive, i) for i, draft in enumerate(drafts) if draft.is_free for alive in draft.survival),
        key=lambda pair: -pair[0],
    )
    rows = len(drafts) + sum(lengths)
    tokens = len(drafts) + sum(sum(draft.survival[: draft.least]) for draft in drafts)
    chain_s = _chain_s(drafts, [len(draft.survival) if draft.is_free else draft.least for draft in drafts], costs)
    most_tokens, num_taken, speed = tokens, 0, tokens / (costs.verify[rows] + chain_s)
    for n, (alive, _) in enumerate(pool, start=1):
        tokens += alive
        if tokens / (costs.verify[rows + n] + chain_s) > speed:
            most_tokens, num_taken, speed = tokens, n, tokens / (costs.verify[rows + n] + chain_s)
    for _, i in pool[:num_taken]:
        lengths[i] += 1
    choices = [DraftChoice(d.drafter, n) if n else DraftChoice() for d, n in zip(drafts, lengths, strict=True)]
    # A sequence that got no draft after all needs no chain.
    return StepPlan(choices, most_tokens / (costs.verify[rows + num_taken] + _chain_s(drafts, lengths, costs)))


def _draft(option: DraftOptions, prices: _Prices) -> _Draft:
    if option.forced is not None:
        survival = option.chain if option.forced.drafter is Drafter.EAGLE3 else option.ngram
        return _Draft(option.forced.drafter, survival, least=option.forced.length, is_free=False)
    chain = option.chain[: prices.max_chain]
    if chain and not option.ngram:
        return _Draft(Drafter.EAGLE3, chain)
    if _gain(chain, prices.row_tokens) - prices.chain_tokens > _gain(option.ngram, prices.row_tokens):
        return _Draft(Drafter.EAGLE3, chain)
    return _Draft(Drafter.NGRAM, option.ngram)


def _gain(survival: Sequence[float], row_tokens: float) -> float:
    """Accepted tokens beyond what their rows cost."""
    return sum(alive - row_tokens for alive in survival if alive > row_tokens)


def _chain_s(drafts: Sequence[_Draft], lengths: Sequence[int], costs: StepCosts) -> float:
    chains = [n for draft, n in zip(drafts, lengths, strict=True) if n and draft.drafter is Drafter.EAGLE3]
    return costs.chain(len(chains), max(chains)) if chains else 0.0
