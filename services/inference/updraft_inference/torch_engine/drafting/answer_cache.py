"""N-gram lookup in earlier answers (after Oliaro et al. 2024, suffix decoding, without its trees).

The newest answers lie in a ring of tokens, and a table of fixed size holds the last position of each n-gram. That bounds the
memory, and a lookup reads at most one n-gram of each length.
"""

from array import array
from collections.abc import Sequence

from updraft_inference.torch_engine.drafting.ngram_index import LENGTHS, NOTHING, NgramMatch
from updraft_inference.torch_engine.proposal import ProposalSource

LONGEST = max(LENGTHS)
_BEYOND = 16
"""Lookups propose no more tokens than this."""
_END = -1
"""Follows each answer, so that no proposal runs from one answer into the next."""
_ENTRIES_PER_TOKEN = 8
"""Table entries per token, for `len(LENGTHS)` n-grams. With more, fewer n-grams overwrite each other."""


class AnswerCache:
    """The newest answers, as far as `num_tokens` tokens hold them."""

    def __init__(self, num_tokens: int) -> None:
        self._ring = array("i", [_END]) * num_tokens
        self._num_written = 0
        """Positions never restart: position p lies at p modulo the size of the ring."""
        self._table = array("q", [-1]) * (_ENTRIES_PER_TOKEN * num_tokens)
        """Position of the token after an n-gram, at the n-gram's hash."""
        self._contested = bytearray(len(self._table))
        """Whether another token followed the time before."""

    def add(self, ids: Sequence[int], first: int, last: int) -> None:
        """Add the tokens from `first` up to `last`; the tokens around them are their context.

        Of a text that does not fit, the end is kept, up to half of the ring.
        """
        ended = min(last + _BEYOND, len(ids))
        begin = max(first - LONGEST, ended - len(self._ring) // 2, 0)
        kept = list(ids[begin:ended])
        start = self._write(kept)
        for end in range(max(first - begin, 1), last - begin):
            for n in LENGTHS:
                if end >= n:
                    self._put(kept[end - n : end], start + end)

    def look_up(self, ids: Sequence[int], k: int, *, longer_than: int = 0) -> NgramMatch:
        """At most `k` tokens that followed the longest known suffix of `ids` the last time, if it is longer than that."""
        for n in LENGTHS:
            if longer_than < n <= len(ids):
                ngram = list(ids[-n:])
                entry = self._entry(ngram)
                position = self._position(ngram, entry)
                if position is not None:
                    source = ProposalSource(n, bool(self._contested[entry]), is_from_cache=True)
                    return NgramMatch(self._read(position, k), source)
        return NOTHING

    def _write(self, ids: list[int]) -> int:
        """Write the tokens contiguously, and return the position of the first."""
        size, length = len(self._ring), len(ids) + 1
        if self._num_written % size + length > size:
            self._num_written += size - self._num_written % size
        start = self._num_written
        self._ring[start % size : start % size + length] = array("i", [*ids, _END])
        self._num_written += length
        return start

    def _put(self, ngram: list[int], position: int) -> None:
        entry = self._entry(ngram)
        before = self._position(ngram, entry)
        self._contested[entry] = before is not None and self._read(before, 1) != self._read(position, 1)
        self._table[entry] = position

    def _entry(self, ngram: list[int]) -> int:
        return hash(tuple(ngram)) % len(self._table)

    def _position(self, ngram: list[int], entry: int) -> int | None:
        """Where the n-gram ended last; None if the entry is another n-gram's, or the text has been overwritten."""
        position = self._table[entry]
        start = position - len(ngram)
        if position < 0 or start < self._num_written - len(self._ring):
            return None
        return position if self._read(start, len(ngram)) == ngram else None

    def _read(self, position: int, num: int) -> list[int]:
        """So many tokens, or those up to the end of their answer."""
        start = position % len(self._ring)
        ids = self._ring[start : start + num].tolist()
        return ids[: ids.index(_END)] if _END in ids else ids
