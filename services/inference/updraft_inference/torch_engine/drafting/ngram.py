"""The n-gram proposer: what followed the same tokens the last time, in the request's own text or in earlier answers.

The longer match wins, and of two equally long ones the request's own. Clients are kept apart: an answer that comes fast was
predicted, and a client must not learn that way what others were answered.
"""

from collections import OrderedDict, deque
from weakref import WeakKeyDictionary

from updraft_inference.engine import Drafter
from updraft_inference.torch_engine.drafting.answer_cache import AnswerCache
from updraft_inference.torch_engine.drafting.ngram_index import NgramIndex, NgramMatch
from updraft_inference.torch_engine.proposal import Proposal
from updraft_inference.torch_engine.sequence import Sequence

MOST_CLIENTS = 16
"""A new client replaces the one that was idle for longest."""
PORTION = 256
"""Tokens of an answer that are indexed per step, in about a millisecond."""
MOST_UNREAD = 64
"""Answers that wait to be indexed; beyond it the oldest is dropped."""


class NgramProposer:
    """Remembers `num_tokens` tokens of answers per client; 0: none."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._indexes: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()
        self._caches: OrderedDict[str, AnswerCache] = OrderedDict()
        self._unread: deque[tuple[str, list[int], int]] = deque(maxlen=MOST_UNREAD)
        """Client, tokens, and the first of them that is not indexed yet."""

    def propose(self, sequence: Sequence, k: int) -> Proposal:
        """At most `k` tokens."""
        match = self._indexes.setdefault(sequence, NgramIndex()).propose(sequence.ids, k)
        cache = self._caches.get(sequence.request.client)
        if cache is not None:
            self._caches.move_to_end(sequence.request.client)
            longer = cache.look_up(sequence.ids, k, longer_than=match.source.num_matched)
            match = longer if longer.ids else match
        if not match.ids:
            return Proposal(source=match.source)
        return Proposal(drafter=Drafter.NGRAM, ids=match.ids, log_probs=[0.0] * len(match.ids), source=match.source)

    def offers(self, sequence: Sequence, chain_ids: list[int]) -> list[NgramMatch]:
        """The token after a chain, by the request's own text and by earlier answers, as far as they know one.

        The chain itself is not searched. The sequence was looked up in this step already.
        """
        ids = [*sequence.ids, *chain_ids]
        index, cache = self._indexes.get(sequence), self._caches.get(sequence.request.client)
        matches = (searched.look_up(ids, 1) for searched in (index, cache) if searched is not None)
        return [match for match in matches if match.ids]

    def keep_up(self) -> None:
        """Index a portion of an answer that has ended: a long one at once would keep other streams waiting."""
        if not self._unread:
            return
        client, ids, first = self._unread.popleft()
        last = min(first + PORTION, len(ids))
        self._cache(client).add(ids, first, last)
        if last < len(ids):
            self._unread.appendleft((client, ids, last))

    def finish(self, sequence: Sequence) -> None:
        """Remember the answer as far as it got."""
        if self._num_tokens and sequence.num_output:
            first = max(sequence.num_prompt, len(sequence.ids) - self._num_tokens)
            self._unread.append((sequence.request.client, sequence.ids, first))

    def index_all(self) -> None:
        """Index everything that waits. (For measurements.)"""
        while self._unread:
            self.keep_up()

    def _cache(self, client: str) -> AnswerCache:
        if client not in self._caches:
            self._caches[client] = AnswerCache(self._num_tokens)
        self._caches.move_to_end(client)
        if len(self._caches) > MOST_CLIENTS:
            self._caches.popitem(last=False)
        return self._caches[client]
