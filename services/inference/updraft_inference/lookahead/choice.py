"""The choice itself, as a pure function: for each sequence a drafter and a length that give most tokens a second.

Expected tokens of a step are one a sequence and the survival of every draft that is verified (Leviathan et al. 2023,
equation 1, without its assumption that all drafts are kept equally often). Survival never rises along a chain, so for one
drafter a sequence the best set of r rows takes the likeliest drafts first, across all sequences: unequal lengths come by
themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from updraft_inference.engine.port import Drafter

MARGIN = 1.05
"""Speculation has to promise so much more than none: costs and rates are measured, measurements err, and the best of many
promises is rather one that errs upwards."""


@dataclass(frozen=True, slots=True)
class Option:
    """What one drafter could do for one sequence: `survival[i]` is the probability that its first i + 1 drafts are kept.
    `entry_s`: what it costs besides, in seconds, however many it drafts."""

    drafter: Drafter
    survival: Sequence[float]
    entry_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """Of one sequence. `length` drafts by `drafter`; none if it is 0."""

    drafter: Drafter = Drafter.NONE
    length: int = 0


@dataclass(frozen=True, slots=True)
class Costs:
    """verify(rows): seconds to verify so many rows of this batch. chain(sequences, length): seconds to draft with the
    model, for so many sequences, chains of so many tokens."""

    verify: Callable[[int], float]
    chain: Callable[[int, int], float]


_NOTHING = Option(Drafter.NONE, ())


def choose(options: Sequence[Sequence[Option]], costs: Costs, *, given: float = 0.0) -> list[Choice]:
    """Choose for every sequence of a batch; `options[i]` are those of sequence i, perhaps none.

    `given` tokens are expected of others in the same step, whose choice is made and whose rows are part of `costs`: what
    is drafted here slows them too.
    """
    batch = len(options)
    none = [Choice()] * batch
    best, best_speed = none, MARGIN * (batch + given) / costs.verify(batch)
    for assigned in _assignments(options):
        choices, speed = _lengths(assigned, costs, given)
        if speed > best_speed:
            best, best_speed = choices, speed
    return best


def _assignments(options: Sequence[Sequence[Option]]) -> list[list[Option]]:
    """Ways to give each sequence one drafter: lookups alone, and with the model's chains up to each length."""
    lookups = [_of(mine, Drafter.NGRAM) for mine in options]
    depth = max((len(_of(mine, Drafter.EAGLE3).survival) for mine in options), default=0)
    ways = [lookups] if any(each.survival for each in lookups) else []
    for length in range(1, depth + 1):
        chains = [_cut(_of(mine, Drafter.EAGLE3), length) for mine in options]
        ways.append(chains)
        if ways[0] is lookups:
            ways.append([max(pair, key=lambda each: sum(each.survival)) for pair in zip(chains, lookups, strict=True)])
    return ways


def _of(options: Sequence[Option], drafter: Drafter) -> Option:
    return next((each for each in options if each.drafter is drafter), _NOTHING)


def _cut(option: Option, length: int) -> Option:
    return replace(option, survival=option.survival[:length])


def _lengths(assigned: Sequence[Option], costs: Costs, given: float) -> tuple[list[Choice], float]:
    """The best lengths for these drafters, and their tokens a second."""
    batch = len(assigned)
    by_model = [each for each in assigned if each.drafter is Drafter.EAGLE3 and each.survival]
    drafting_s = sum(each.entry_s for each in by_model)
    if by_model:
        drafting_s += costs.chain(len(by_model), max(len(each.survival) for each in by_model))
    # A stable sort: of equal ones the earlier draft of a chain comes first.
    drafts = sorted(
        ((alive, i) for i, each in enumerate(assigned) for alive in each.survival), key=lambda draft: -draft[0]
    )
    gains = list(accumulate((alive for alive, _ in drafts), initial=batch + given))
    speeds = [gain / (costs.verify(batch + rows) + drafting_s) for rows, gain in enumerate(gains)]
    rows = max(range(len(speeds)), key=speeds.__getitem__)
    lengths = [0] * batch
    for _, i in drafts[:rows]:
        lengths[i] += 1
    chosen = [Choice(each.drafter, n) if n else Choice() for each, n in zip(assigned, lengths, strict=True)]
    return chosen, speeds[rows]
