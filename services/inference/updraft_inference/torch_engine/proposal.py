"""A proposal for one sequence and its source. Every proposer makes these, and every verification consumes them."""

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
    """Drafted by the draft model; the other fields then describe the n-gram match at the same place."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Tokens proposed for one sequence.

    `log_probs`: of each token under the proposer. `q`: the distributions that the tokens were drawn from, float32 [k, V];
    None for point masses.
    """

    drafter: Drafter = Drafter.NONE
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    q: Tensor | None = None
    source: ProposalSource = NO_MATCH

    def first(self, num_tokens: int) -> "Proposal":
        if num_tokens <= 0:
            return Proposal(source=self.source)
        return Proposal(
            drafter=self.drafter,
            ids=self.ids[:num_tokens],
            log_probs=self.log_probs[:num_tokens],
            q=None if self.q is None else self.q[:num_tokens],
            source=self.source,
        )
