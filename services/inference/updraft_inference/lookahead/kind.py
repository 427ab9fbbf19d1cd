"""Kinds of drafts: what is kept of one kind says little about another."""

from typing import NamedTuple


class Kind(NamedTuple):
    """Of a lookup how it was found; `MODEL` for the chains of a draft model."""

    matched: int = 0
    """Tokens before it that were the same."""
    is_contested: bool = False
    """The last two times other tokens followed them."""
    is_earlier: bool = False
    """It comes from an earlier answer, not from the request's own text."""

    @property
    def is_weak(self) -> bool:
        """Seldom right."""
        return self.matched == 1 or self.is_contested


MODEL = Kind()
