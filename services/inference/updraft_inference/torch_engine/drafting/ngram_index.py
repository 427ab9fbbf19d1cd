"""N-gram lookup in one text: propose what followed the same tokens the last time (Saxena 2023, prompt lookup)."""

from dataclasses import dataclass, field
from typing import NamedTuple

from updraft_inference.torch_engine.proposal import NO_MATCH, ProposalSource

LENGTHS = (8, 5, 3, 2, 1)
"""Lengths of the suffix that is looked up, longest first, because a longer match is a better guess."""


class NgramMatch(NamedTuple):
    """Tokens that followed a match."""

    ids: list[int]
    source: ProposalSource


NOTHING = NgramMatch([], NO_MATCH)


@dataclass(slots=True)
class NgramIndex:
    """Where each n-gram of one sequence ended last. It grows by the new tokens only."""

    _ends: dict[tuple[int, ...], tuple[int, bool]] = field(default_factory=dict)
    """Last end, and whether another token followed the time before."""
    _num_indexed: int = 0

    def propose(self, ids: list[int], k: int) -> NgramMatch:
        """`k` tokens that followed the latest earlier occurrence of the longest known suffix of `ids`."""
        self._index(ids)
        return self.look_up(ids, k)

    def look_up(self, ids: list[int], k: int) -> NgramMatch:
        """The same for a text of which only the beginning may be indexed."""
        for n in LENGTHS:
            known = self._ends.get(tuple(ids[-n:])) if len(ids) > n else None
            if known is not None:
                end, is_contested = known
                return NgramMatch(_continuation(ids, end, k), ProposalSource(n, is_contested))
        return NOTHING

    def _index(self, ids: list[int]) -> None:
        # The suffix itself is left out until a token follows it, or every lookup would find itself.
        for end in range(max(self._num_indexed, min(LENGTHS)), len(ids)):
            for n in LENGTHS:
                if end >= n:
                    ngram = tuple(ids[end - n : end])
                    before = self._ends.get(ngram)
                    self._ends[ngram] = (end, before is not None and ids[before[0]] != ids[end])
        self._num_indexed = max(self._num_indexed, len(ids))


def _continuation(ids: list[int], end: int, k: int) -> list[int]:
    """The `k` tokens from `end` on; a repeating text continues past its own end by its period."""
    period = len(ids) - end
    return [ids[end + i % period] for i in range(k)]
