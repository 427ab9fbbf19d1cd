"""A proposal for one sequence and its source. Every proposer makes these, and every verification consumes them."""

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from updraft_inference.engine import Drafter


class ProposalSource(NamedTuple):
    """How a proposal came about. Acceptance is estimated per source, because one source says little about another."""

    num_matched: int = 0
    """Length of the n-gram that matched. 0: none matched, or nobody looked."""
    is_contested: bool = False
    """Another token followed the n-gram the time before."""
    is_from_cache: bool = False
    """Found in an earlier answer, not in the request's own text."""
    is_chain: bool = False
    """Drafted by the draft model, mixed or alone; the other fields then describe the n-gram match where it begins."""

    @property
    def is_weak(self) -> bool:
        """An n-gram match that is seldom right."""
        return self.num_matched < 2 or self.is_contested


NO_MATCH = ProposalSource()
CHAIN_ALONE = ProposalSource(is_chain=True)
_CHAIN_BESIDE_WEAK, _CHAIN_BESIDE_STRONG = ProposalSource(1, is_chain=True), ProposalSource(2, is_chain=True)


def chain_source(match: ProposalSource | None) -> ProposalSource:
    """The source of a chain where n-gram lookup found `match`; None: nobody looked.

    Text that lookup cannot predict is harder for a draft model too.
    """
    if match is None:
        return CHAIN_ALONE
    return _CHAIN_BESIDE_WEAK if match.is_weak else _CHAIN_BESIDE_STRONG


BANDS = (0.003, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9)
"""Bounds between values of q that count as similar."""


class Offer(NamedTuple):
    """The token of one proposer. `q`: its probability by the draft model, whoever offers it."""

    token_id: int
    source: ProposalSource
    q: float


class OfferKind(NamedTuple):
    """Offers that are judged together."""

    source: ProposalSource
    band: int
    """Index of the band of q in `BANDS`."""
    is_agreed: bool
    """Another proposer offers the same token."""
    is_sampled: bool
    """The target's token is sampled, which makes it harder to predict."""


@dataclass(slots=True)
class Place:
    """Offers for one place of a chain that differ, the draft model's first. `taken` is the index of the one in the chain.

    `is_drawn`: if the draft model's offer is taken, its token is drawn from q. The offer is then right if the target accepts
    such a token, which is known only if it was taken.
    """

    offers: Sequence[Offer]
    is_sampled: bool = False
    is_drawn: bool = False
    taken: int = 0

    def kinds(self) -> list[OfferKind]:
        """The kind of each offer, a function of what is known before a token is drawn."""
        ids = [offer.token_id for offer in self.offers]
        return [
            OfferKind(offer.source, bisect(BANDS, offer.q), ids.count(offer.token_id) > 1, self.is_sampled)
            for offer in self.offers
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Tokens proposed for one sequence.

    `log_probs`: of each token under its proposer. `q`: the distributions that the tokens were drawn from, float32 [k, V]; None
    for point masses. `places`: where proposers differed about a token of a chain.
    """

    drafter: Drafter = Drafter.NONE
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    q: Tensor | None = None
    source: ProposalSource = NO_MATCH
    places: Mapping[int, Place] = field(default_factory=dict)

    @property
    def is_chain(self) -> bool:
        """The draft model was asked."""
        return self.drafter in {Drafter.EAGLE3, Drafter.HYBRID}

    @property
    def looked_up(self) -> tuple[int, ...]:
        """Indices of a chain's tokens that n-gram lookup proposed against the draft model."""
        return tuple(index for index, place in self.places.items() if place.taken)

    def first(self, num_tokens: int) -> "Proposal":
        if num_tokens <= 0:
            return Proposal(source=self.source)
        return Proposal(
            drafter=self.drafter,
            ids=self.ids[:num_tokens],
            log_probs=self.log_probs[:num_tokens],
            q=None if self.q is None else self.q[:num_tokens],
            source=self.source,
            places={index: place for index, place in self.places.items() if index < num_tokens},
        )
