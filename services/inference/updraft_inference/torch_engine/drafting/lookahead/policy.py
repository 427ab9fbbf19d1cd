"""Lookahead of a running engine: asked before each step, told after it.

Lookups cost nothing until they are verified, so what they would have proposed is scored against what came, whether it was
verified or not: they need no exploration. A draft model is tried on one sequence now and then, so that one that became
better is noticed.
"""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from updraft_inference.engine import Drafter
from updraft_inference.torch_engine.drafting.lookahead.chains import ChainCost
from updraft_inference.torch_engine.drafting.lookahead.choice import Choice, Chosen, Costs, Option, choose
from updraft_inference.torch_engine.drafting.lookahead.cost import CostTable
from updraft_inference.torch_engine.drafting.lookahead.kind import ALONE, NOTHING, ProposalSource, chain_beside
from updraft_inference.torch_engine.drafting.lookahead.rates import AcceptanceEstimator, Prior, survival
from updraft_inference.torch_engine.drafting.lookahead.rest import Rest
from updraft_inference.torch_engine.drafting.lookahead.tries import Tries

UNKNOWN = 8.0
"""Chains of the draft model that are made whatever is known, before anything is concluded from them."""
_SHARED_MEMORY, _OWN_MEMORY, _OWN_WEIGHT = 100.0, 40.0, 4.0
_ASSUMED_MODEL, _ASSUMED_LOOKUP, _ASSUMED_WEAK = Prior(0.5, 2.0), Prior(0.3, 2.0), Prior(0.1, 2.0)
_LATELY = 200
"""Proposals that what is said of a drafter goes by."""


@dataclass(frozen=True, slots=True)
class Promise:
    """Of a chain that was chosen: it should save so many seconds, if so many drafts are kept; each one saves `token_s`."""

    saved_s: float
    kept: float
    token_s: float

    def come(self, kept: int) -> float:
        """Seconds that it saved."""
        return self.saved_s + (kept - self.kept) * self.token_s


@dataclass(slots=True, eq=False)
class Record:
    """What a sequence's drafts did so far, by kind."""

    chain: ProposalSource = ALONE
    """Of the last step's chain, if it had one."""
    promise: Promise | None = None
    """Of that chain, if it was chosen beside lookups."""
    rates: defaultdict[ProposalSource, AcceptanceEstimator] = field(
        default_factory=lambda: defaultdict(lambda: AcceptanceEstimator(_OWN_MEMORY))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One sequence of a step: `lookup` drafts of a `kind` were found (None: nobody looked); the draft model may make `chain`.
    `forced`: so many by whoever can, whatever it costs."""

    record: Record
    lookup: int = 0
    kind: ProposalSource | None = None
    chain: int = 0
    forced: int | None = None

    @property
    def has_lookups(self) -> bool:
        """Somebody looked, whatever was found."""
        return self.kind is not None


class Lookahead:
    """Chooses for each step. `is_fixed` always answers the longest drafts (for measurements). Not thread-safe."""

    def __init__(self, cost: CostTable, *, is_fixed: bool = False) -> None:
        self.cost = cost
        self.last = 0
        """The longest drafts of the last step."""
        self._is_fixed = is_fixed
        self._shared = defaultdict[ProposalSource, AcceptanceEstimator](lambda: AcceptanceEstimator(_SHARED_MEMORY))
        self._chains = ChainCost(cost)
        self._alone, self._beside = Tries(), Tries()
        """Of the draft model, without lookups and beside them."""
        self._rest = Rest()
        self._chained: deque[ProposalSource] = deque(maxlen=_LATELY)
        self._found: deque[ProposalSource] = deque(maxlen=_LATELY)
        """What was drafted lately, by the draft model and by lookup."""

    def admits_model(self, num_at_once: int) -> bool:
        """Whether the draft model is to read a request that begins now, with lookups; so many run at once with it."""
        return self._rest.admits(num_at_once)

    def reset_model(self) -> None:
        """Forget what an earlier draft model did: a new one starts from full chains."""
        for kind in [kind for kind in self._shared if kind.is_chain]:
            del self._shared[kind]
        self._chained.clear()
        for each in (self._alone, self._beside, self._rest):
            each.begin_anew()

    def plan(self, asks: Sequence[Ask]) -> list[Choice]:
        """Choose for every sequence of a step. What it may read of prompts besides is not its matter: beside them drafts would
        look cheap, and streams would wait for both."""
        forced = {i: choice for i, ask in enumerate(asks) if (choice := self._forced(ask)) is not None}
        tried = [self._tried(asks, has_lookups=has_lookups) for has_lookups in (False, True)]
        forced |= {i: Choice(Drafter.EAGLE3, asks[i].chain) for i in tried if i is not None and i not in forced}
        free = [self._options(ask) for i, ask in enumerate(asks) if i not in forced]
        given = sum(1 + self._expected(asks[i], choice) for i, choice in forced.items())
        chosen = choose(free, self._costs(len(asks), free, list(forced.values())), given=given)
        rest = iter(chosen.choices)
        choices = [forced[i] if i in forced else next(rest) for i in range(len(asks))]
        self.last = max((choice.length for choice in choices), default=0)
        for ask, choice in zip(asks, choices, strict=True):
            self._note(ask, choice)
        self._note_chosen([ask for i, ask in enumerate(asks) if i not in forced], chosen)
        return choices

    def observe_verdict(self, record: Record, kept: int, *, is_refused: bool) -> None:
        """Of the draft model's chain of the last step: its first `kept` drafts were right, and then one was wrong or none was
        left."""
        self._tries(has_lookups=record.chain != ALONE).observe(record, kept)
        if record.promise is not None:
            self._rest.save(record.promise.come(kept))
        self.observe(record, record.chain, kept, is_refused=is_refused)

    def observe(self, record: Record, kind: ProposalSource, kept: int, *, is_refused: bool) -> None:
        """The same of a lookup."""
        self._shared[kind].observe(kept, is_refused=is_refused)
        record.rates[kind].observe(kept, is_refused=is_refused)

    def observe_step(self, *, batch: int, rows: int, verify_s: float, num_beside: int = 0) -> None:
        """A forward read `rows` rows: of `batch` sequences that drafted, and `num_beside` of prompts."""
        if not num_beside:
            self.cost.observe(batch, rows, verify_s)
        elif batch:
            self.cost.observe_mixed(rows, verify_s)

    def observe_chains(self, *, sequences: int, length: int, behind: int, seconds: float, beside: float = 0.0) -> None:
        """The draft model made chains of so many sequences, which were `behind` rows behind all together; a share of them is
        `beside` lookups."""
        read_s = self._chains.observe(sequences=sequences, length=length, behind=behind, seconds=seconds)
        self.observe_reading(beside * read_s)

    def observe_reading(self, seconds: float) -> None:
        """The draft model read for so long what requests beside lookups had gained."""
        self._rest.read(seconds)

    def survival(self, drafter: Drafter, length: int) -> float:
        """See the port: the mean of those that were verified lately. Called by other threads."""
        made = Counter(tuple(self._chained if drafter is Drafter.EAGLE3 else self._found))
        if not made:
            return math.nan
        nothing = AcceptanceEstimator(1.0)
        alive = {
            kind: survival(nothing, self._shared.get(kind, nothing), _assumed(kind), length, 1.0)[-1] for kind in made
        }
        return sum(alive[kind] * num for kind, num in made.items()) / made.total()

    def step_seconds(self, rows: int) -> float:
        """See the port. Called by other threads."""
        return self.cost.alone(rows)

    # -- how ----------------------------------------------------------------------------------------------------------

    def _note(self, ask: Ask, choice: Choice) -> None:
        ask.record.chain, ask.record.promise = chain_beside(ask.kind), None
        if choice.drafter is Drafter.EAGLE3:
            self._chained.append(ask.record.chain)
        elif choice.length:
            self._found.append(ask.kind or NOTHING)

    def _note_chosen(self, asks: Sequence[Ask], chosen: Chosen) -> None:
        """Of those whose drafter was chosen: for whom the draft model was, and what it promised beside lookups."""
        by_model = [
            (a, choice) for a, choice in zip(asks, chosen.choices, strict=True) if choice.drafter is Drafter.EAGLE3
        ]
        beside = [(ask, choice) for ask, choice in by_model if ask.has_lookups]
        for has_lookups in {ask.has_lookups for ask, _ in by_model}:
            self._tries(has_lookups=has_lookups).postpone()
        if any(ask.chain and ask.has_lookups for ask in asks):
            self._rest.count_step()
        for ask, choice in beside:
            kept, saved_s = self._expected(ask, choice), chosen.saved_s / len(by_model)
            ask.record.promise = Promise(saved_s=saved_s, kept=kept, token_s=chosen.token_s)

    def _tries(self, *, has_lookups: bool) -> Tries:
        return self._beside if has_lookups else self._alone

    def _forced(self, ask: Ask) -> Choice | None:
        is_unknown = ask.chain > 0 and self._num_chains < UNKNOWN
        wish = ask.forced
        if wish is None and (self._is_fixed or is_unknown):
            wish = max(ask.lookup, ask.chain)
        if wish is None:
            return None
        if ask.chain and (is_unknown or not ask.lookup or self._is_better(ask)):
            return Choice(Drafter.EAGLE3, min(wish, ask.chain)) if wish else Choice()
        length = min(wish, ask.lookup)
        return Choice(Drafter.NGRAM, length) if length else Choice()

    @property
    def _num_chains(self) -> float:
        """Of the draft model's, that are remembered."""
        return sum(rates.num_seen(0) for kind, rates in self._shared.items() if kind.is_chain)

    def _is_better(self, ask: Ask) -> bool:
        """The draft model's chain promises more than the lookup."""
        gains = {option.drafter: sum(option.survival) for option in self._options(ask)}
        return gains.get(Drafter.EAGLE3, 0.0) > gains.get(Drafter.NGRAM, 0.0)

    def _expected(self, ask: Ask, choice: Choice) -> float:
        """Drafts that are kept."""
        survivals = (option.survival for option in self._options(ask) if option.drafter is choice.drafter)
        return sum(next(survivals, ())[: choice.length])

    def _options(self, ask: Ask) -> list[Option]:
        options = []
        for drafter, kind, length in (
            (Drafter.NGRAM, ask.kind or NOTHING, ask.lookup),
            (Drafter.EAGLE3, chain_beside(ask.kind), ask.chain),
        ):
            if length:
                own, shared = ask.record.rates[kind], self._shared[kind]
                alive = survival(own, shared, _assumed(kind), length, _OWN_WEIGHT)
                options.append(Option(drafter, alive))
        return options

    def _costs(self, batch: int, free: Sequence[Sequence[Option]], forced: Sequence[Choice]) -> Costs:
        more = sum(choice.length + 1 for choice in forced)
        chains = [choice.length for choice in forced if choice.drafter is Drafter.EAGLE3]
        token_s = cache(self._chains.token)
        alone = max(chains) * token_s(len(chains)) if chains else 0.0
        most = more + sum(1 + max((len(each.survival) for each in mine), default=1) for mine in free)
        seconds = [each + alone for each in self.cost.up_to(batch, most)[more:]]  # what was forced is made anyway

        def chain(sequences: int, length: int) -> float:
            return max(length, *chains, 0) * token_s(sequences + len(chains)) - alone

        return Costs(seconds, chain)

    def _tried(self, asks: Sequence[Ask], *, has_lookups: bool) -> int | None:
        """The sequence that the draft model is tried on in this step, of those that have lookups or of the others."""
        able = [i for i, ask in enumerate(asks) if ask.chain and ask.forced is None and ask.has_lookups is has_lookups]
        tried = self._tries(has_lookups=has_lookups).take([asks[i].record for i in able])
        if tried is None:
            return None
        ask = asks[able[tried]]
        self._tries(has_lookups=has_lookups).expect(self._expected(ask, Choice(Drafter.EAGLE3, ask.chain)))
        return able[tried]


def _assumed(kind: ProposalSource) -> Prior:
    if kind.is_chain:
        return _ASSUMED_MODEL
    return _ASSUMED_WEAK if kind.is_weak else _ASSUMED_LOOKUP
