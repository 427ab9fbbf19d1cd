"""Prompt-and-output lookup: propose what followed the last time the same tokens were seen (Saxena 2023, prompt lookup)."""

from dataclasses import dataclass, field

LENGTHS = (8, 5, 3, 2)
"""Lengths of the suffix that is looked up, longest first: a longer match is a better guess, one token is noise."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """Tokens that are proposed, and how many tokens before them matched; none and 0 if nothing did."""

    ids: list[int]
    strength: int


_NOTHING = Lookup([], 0)


@dataclass(slots=True)
class NgramIndex:
    """Last end position of every n-gram of one sequence; grows by the new tokens only."""

    _ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    _num_indexed: int = 0

    def propose(self, ids: list[int], k: int) -> Lookup:
        """`k` tokens that followed the latest earlier occurrence of the longest known suffix of `ids`."""
        self._index(ids)
        for n in LENGTHS:
            end = self._ends.get(tuple(ids[-n:])) if len(ids) > n else None
            if end is not None:
                return Lookup(_continuation(ids, end, k), n)
        return _NOTHING

    def _index(self, ids: list[int]) -> None:
        # The suffix itself is left out until a token follows it, else every lookup would find itself.
        for end in range(max(self._num_indexed, min(LENGTHS)), len(ids)):
            for n in LENGTHS:
                if end >= n:
                    self._ends[tuple(ids[end - n : end])] = end
        self._num_indexed = max(self._num_indexed, len(ids))


def _continuation(ids: list[int], end: int, k: int) -> list[int]:
    """The `k` tokens from `end` on; a repeating sequence is continued past its own end by its period."""
    period = len(ids) - end
    return [ids[end + i % period] for i in range(k)]
