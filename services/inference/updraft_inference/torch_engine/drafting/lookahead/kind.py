"""Kinds of drafts: what is kept of one kind says little about another."""

from typing import NamedTuple


class Kind(NamedTuple):
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


NOTHING = Kind()
ALONE = Kind(is_chain=True)
_BESIDE_WEAK, _BESIDE_STRONG = Kind(1, is_chain=True), Kind(2, is_chain=True)


def chain_beside(lookup: Kind | None) -> Kind:
    """Of a chain where lookups found this; None: nobody looked. What lookups cannot foresee is harder for a draft model too."""
    if lookup is None:
        return ALONE
    return _BESIDE_WEAK if lookup.is_weak else _BESIDE_STRONG
