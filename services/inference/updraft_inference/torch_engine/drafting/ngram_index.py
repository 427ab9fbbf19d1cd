"""Prompt-and-output lookup: propose what followed the last time the same tokens were seen (Saxena 2023, prompt lookup)."""

from dataclasses import dataclass, field

from updraft_inference.torch_engine.drafting.lookahead.kind import ProposalSource

LENGTHS = (8, 5, 3, 2, 1)
"""Lengths of the suffix that is looked up, longest first: a longer match is a better guess."""


@dataclass(frozen=True, slots=True)
class NgramMatch:
    """Tokens that are proposed, and how they were found (`python -m bench.serving.lookups` tells how good each kind is)."""

    ids: list[int]
    kind: ProposalSource


NOTHING = NgramMatch([], ProposalSource())


@dataclass(slots=True)
class NgramIndex:
    """Last end position of every n-gram of one sequence; grows by the new tokens only."""

    _ends: dict[tuple[int, ...], tuple[int, bool]] = field(default_factory=dict)
    """And if another token followed the time before."""
    _num_indexed: int = 0

    def propose(self, ids: list[int], k: int) -> NgramMatch:
        """`k` tokens that followed the latest earlier occurrence of the longest known suffix of `ids`."""
        self._index(ids)
        for n in LENGTHS:
            found = self._ends.get(tuple(ids[-n:])) if len(ids) > n else None
            if found is not None:
                end, is_contested = found
                return NgramMatch(_continuation(ids, end, k), ProposalSource(n, is_contested))
        return NOTHING

    def _index(self, ids: list[int]) -> None:
        # The suffix itself is left out until a token follows it, else every lookup would find itself.
        for end in range(max(self._num_indexed, min(LENGTHS)), len(ids)):
            for n in LENGTHS:
                if end >= n:
                    ngram = tuple(ids[end - n : end])
                    before = self._ends.get(ngram)
                    self._ends[ngram] = (end, before is not None and ids[before[0]] != ids[end])
        self._num_indexed = max(self._num_indexed, len(ids))


def _continuation(ids: list[int], end: int, k: int) -> list[int]:
    """The `k` tokens from `end` on; a repeating sequence is continued past its own end by its period."""
    period = len(ids) - end
    return [ids[end + i % period] for i in range(k)]
