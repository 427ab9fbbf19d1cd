"""Which proposer's token continues a chain: the one that was right more often in similar places. Pure.

For each place of a chain the draft model offers a token, and so may n-gram lookup: from the request's own text, and from
earlier answers. Where they differ, one is taken. Once the place is verified, the target's token shows which were right,
whichever was taken. Confidence is the mean of a Beta posterior whose counts fade.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from updraft_inference.engine import Drafter
from updraft_inference.torch_engine.drafting.ngram_index import NgramMatch
from updraft_inference.torch_engine.proposal import Offer, OfferKind, Place, Proposal
from updraft_inference.torch_engine.sequence import Sequence

MEMORY = 500.0
"""About how many offers of a kind count."""
PRIOR_WEIGHT = 4.0
"""Offers that a prior counts like."""

_RIGHT_BY_LENGTH = {1: 0.35, 2: 0.5, 3: 0.6, 5: 0.7, 8: 0.85}
"""Prior of a lookup by the length of its match, and its share where the match is contested; typical of questions on
mathematics and SQL."""
_CONTESTED_SHARE = 0.3
_AGREED, _ALONE = (0.4, 0.6), (0.0, 0.5)
"""Prior of the draft model's offer, as offset and slope over q, with and without a lookup that agrees."""


class Chooser:
    """Takes an offer for each place where they differ, and learns from the places that were verified."""

    def __init__(self) -> None:
        self._kinds = _Rates()
        self._sources = _Rates()
        """Rates of lookups with the same source. They do not depend on the draft model."""

    def reset_model(self) -> None:
        """Another draft model is served, so that q and agreement mean something else."""
        self._kinds = _Rates()

    def take(self, place: Place) -> int:
        """Index of the offer that is most likely right; 0, the draft model's, if none is likelier."""
        chances = [self._chance(kind, offer) for kind, offer in zip(place.kinds(), place.offers, strict=True)]
        best = chances.index(max(chances))
        ids = [offer.token_id for offer in place.offers]
        return ids.index(ids[best])  # a token that the draft model offers too is its own

    def learn(self, proposal: Proposal, accepted: int, bonus_id: int) -> None:
        """The target accepted the first `accepted` tokens of a proposal, and has `bonus_id` after them."""
        target_ids = [*proposal.ids[:accepted], bonus_id]
        for index, place in proposal.places.items():
            if index < len(target_ids):
                self._learn(place, proposal.ids[index], target_ids[index])

    def _learn(self, place: Place, chain_id: int, target_id: int) -> None:
        for i, (kind, offer) in enumerate(zip(place.kinds(), place.offers, strict=True)):
            is_right = offer.token_id == target_id
            if i == 0 and place.is_drawn:
                if place.taken != 0:
                    continue
                is_right = chain_id == target_id
            self._kinds.add(kind, is_right=is_right)
            if not kind.source.is_chain:
                self._sources.add((kind.source, kind.is_sampled), is_right=is_right)

    def _chance(self, kind: OfferKind, offer: Offer) -> float:
        """Estimated probability that an offer is right."""
        source = kind.source
        if source.is_chain:
            offset, slope = _AGREED if kind.is_agreed else _ALONE
            return self._kinds.mean(kind, offset + slope * offer.q)
        prior = _RIGHT_BY_LENGTH[source.num_matched] * (_CONTESTED_SHARE if source.is_contested else 1.0)
        return self._kinds.mean(kind, self._sources.mean((source, kind.is_sampled), prior))


FindMatches = Callable[[list[int]], list[NgramMatch]]
"""Finds the tokens that may follow a chain: at most one from each text."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """The lookups that chains are mixed with. For the sequences in `alone` the model drafts by itself, and lookups are only
    compared."""

    chooser: Chooser = field(default_factory=Chooser)
    lookups: Mapping[Sequence, FindMatches] = field(default_factory=dict)
    alone: frozenset[Sequence] = frozenset()

    def matches(self, sequence: Sequence, chain_ids: list[int]) -> list[NgramMatch]:
        """Tokens that may follow a chain, one per lookup."""
        return self.lookups[sequence](chain_ids) if sequence in self.lookups else []

    def take(self, sequence: Sequence, place: Place) -> int:
        """Index of the offer for a place of a sequence's chain."""
        return 0 if sequence in self.alone else self.chooser.take(place)

    def drafter(self, sequence: Sequence) -> Drafter:
        """Who makes the chain of a sequence."""
        is_mixed = sequence in self.lookups and sequence not in self.alone
        return Drafter.HYBRID if is_mixed else Drafter.EAGLE3


@dataclass(slots=True)
class _Rates:
    """Fading counts of right offers, and of all."""

    _right: defaultdict[Hashable, float] = field(default_factory=lambda: defaultdict(float))
    _total: defaultdict[Hashable, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, key: Hashable, *, is_right: bool) -> None:
        fade = 1.0 - 1.0 / MEMORY
        self._right[key] = self._right[key] * fade + is_right
        self._total[key] = self._total[key] * fade + 1.0

    def mean(self, key: Hashable, prior: float) -> float:
        right, total = self._right.get(key, 0.0), self._total.get(key, 0.0)
        return (right + prior * PRIOR_WEIGHT) / (total + PRIOR_WEIGHT)
