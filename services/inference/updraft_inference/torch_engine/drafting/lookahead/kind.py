"""Kinds of drafts: what is kept of one kind says little about another."""

from typing import NamedTuple


class ProposalSource(NamedTuple):
    """Of a lookup how it was found, or of a draft model's chain what lookups found for the same place."""

    matched: int = 0
    """Tokens before it that were the same; 0: none were, or nobody looked."""
    is_contested: bool = False
    """The last two times other tokens followed them."""
    is_earlier: bool = False
    """It comes from an earlier answer, not from the request's own text."""
    is_chain: bool = False

    @property
    def is_weak(self) -> bool:
        """Of a lookup: seldom right."""
        return self.matched < 2 or self.is_contested


NOTHING = ProposalSource()
ALONE = ProposalSource(is_chain=True)
_BESIDE_WEAK, _BESIDE_STRONG = ProposalSource(1, is_chain=True), ProposalSource(2, is_chain=True)


def chain_beside(lookup: ProposalSource | None) -> ProposalSource:
    """Of a chain where lookups found this; None: nobody looked. What lookups cannot foresee is harder for a draft model too."""
    if lookup is None:
        return ALONE
    return _BESIDE_WEAK if lookup.is_weak else _BESIDE_STRONG
