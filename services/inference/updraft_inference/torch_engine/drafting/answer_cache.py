"""Answers of the past, looked up by their last tokens (after Oliaro et al. 2024, suffix decoding, without its trees).

The newest answers lie in a ring of tokens, and a table of fixed size says where each n-gram of them was last: what is written
over is forgotten. Memory is bounded by that, and a lookup reads no more than one n-gram of each length.
"""

from array import array
from collections.abc import Sequence

from updraft_inference.torch_engine.drafting.lookahead.kind import ProposalSource
from updraft_inference.torch_engine.drafting.ngram_index import LENGTHS, NOTHING, NgramMatch

LONGEST = max(LENGTHS)
_BEYOND = 16
"""Tokens: lookups propose no more."""
_END = -1
"""Behind each answer: nothing goes on from one to the next."""
_PLACES_A_TOKEN = 8
"""For as many n-grams as there are `LENGTHS`: more places, fewer n-grams that take the place of another one."""


class AnswerCache:
    """The answers of the past, as far as `num_tokens` tokens hold them."""

    def __init__(self, num_tokens: int) -> None:
        self._ring = array("i", [_END]) * num_tokens
        self._num_written = 0
        """Positions are counted on for ever: position p lies at p modulo the ring's size."""
        self._table = array("q", [-1]) * (_PLACES_A_TOKEN * num_tokens)
        """Position of the token after an n-gram, at the n-gram's hash."""
        self._contested = bytearray(len(self._table))
        """If another token followed the time before."""

    def add(self, ids: Sequence[int], first: int, last: int) -> None:
        """Remember the tokens from `first` up to `last`, after those that they followed; what comes next only goes on from
        them. Of what does not fit half of the ring the end is kept."""
        ended = min(last + _BEYOND, len(ids))
        begin = max(first - LONGEST, ended - len(self._ring) // 2, 0)
        kept = list(ids[begin:ended])
        start = self._write(kept)
        for end in range(max(first - begin, 1), last - begin):
            for n in LENGTHS:
                if end >= n:
                    self._put(kept[end - n : end], start + end)

    def propose(self, ids: Sequence[int], k: int, *, longer_than: int = 0) -> NgramMatch:
        """At most `k` tokens that followed the longest known suffix of `ids` the last time, if it is longer than that."""
        for n in LENGTHS:
            if longer_than < n <= len(ids):
                ngram = list(ids[-n:])
                place = self._place(ngram)
                position = self._followed(ngram, place)
                if position is not None:
                    return NgramMatch(
                        self._read(position, k), ProposalSource(n, bool(self._contested[place]), is_earlier=True)
                    )
        return NOTHING

    def _write(self, ids: list[int]) -> int:
        """Their first position: they lie in one piece."""
        size, length = len(self._ring), len(ids) + 1
        if self._num_written % size + length > size:
            self._num_written += size - self._num_written % size
        start = self._num_written
        self._ring[start % size : start % size + length] = array("i", [*ids, _END])
        self._num_written += length
        return start

    def _put(self, ngram: list[int], position: int) -> None:
        place = self._place(ngram)
        before = self._followed(ngram, place)
        self._contested[place] = before is not None and self._read(before, 1) != self._read(position, 1)
        self._table[place] = position

    def _place(self, ngram: list[int]) -> int:
        return hash(tuple(ngram)) % len(self._table)

    def _followed(self, ngram: list[int], place: int) -> int | None:
        """Where the n-gram ended last; None where the place is another one's, or that text is written over."""
        position = self._table[place]
        start = position - len(ngram)
        if position < 0 or start < self._num_written - len(self._ring):
            return None
        return position if self._read(start, len(ngram)) == ngram else None

    def _read(self, position: int, num: int) -> list[int]:
        """So many tokens, or those up to the end of their answer."""
        start = position % len(self._ring)
        ids = self._ring[start : start + num].tolist()
        return ids[: ids.index(_END)] if _END in ids else ids
