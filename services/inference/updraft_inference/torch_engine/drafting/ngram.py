"""What followed the last time, in the request's own text or in earlier answers to its client: the longer match is taken.

Of two that are as long the request's own is; `python -m bench.serving.lookups` tells how good both are. Clients are kept
apart: how fast an answer comes tells whether it was foreseen, and that may tell a client nothing of what others were told.
"""

from collections import OrderedDict, deque

from updraft_inference.torch_engine.drafting.answer_cache import AnswerCache
from updraft_inference.torch_engine.drafting.ngram_index import NgramMatch
from updraft_inference.torch_engine.sequence import Sequence

MOST_CLIENTS = 16
"""Who asked nothing for longest is forgotten for a new one."""
PORTION = 256
"""Tokens of an answer that are read into memory in one step, in about a millisecond."""
MOST_UNREAD = 64
"""Answers that wait for it; beyond it the oldest is forgotten."""


class NgramProposer:
    """Remembers `num_tokens` tokens of answers a client; 0: none."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._histories: OrderedDict[str, AnswerCache] = OrderedDict()
        self._unread: deque[tuple[str, list[int], int]] = deque(maxlen=MOST_UNREAD)
        """Client, tokens, and the first of them that is not read into memory."""

    def propose(self, sequence: Sequence, k: int) -> NgramMatch:
        """At most `k` tokens."""
        own = sequence.index.propose(sequence.ids, k)
        history = self._histories.get(sequence.request.client)
        if history is None:
            return own
        self._histories.move_to_end(sequence.request.client)
        other = history.propose(sequence.ids, k, longer_than=own.kind.matched)
        return other if other.ids else own

    def remember(self, sequence: Sequence) -> None:
        """Its answer as far as it got: `read_on` does."""
        if self._num_tokens and sequence.num_output:
            first = max(sequence.num_prompt, len(sequence.ids) - self._num_tokens)
            self._unread.append((sequence.request.client, sequence.ids, first))

    def read_all(self) -> None:
        """Read everything that is to be remembered."""
        while self._unread:
            self.read_on()

    def read_on(self) -> None:
        """Read a portion of what is to be remembered: all of a long answer at once would keep others waiting."""
        if not self._unread:
            return
        client, ids, first = self._unread.popleft()
        last = min(first + PORTION, len(ids))
        self._of(client).add(ids, first, last)
        if last < len(ids):
            self._unread.appendleft((client, ids, last))

    def _of(self, client: str) -> AnswerCache:
        if client not in self._histories:
            self._histories[client] = AnswerCache(self._num_tokens)
        self._histories.move_to_end(client)
        if len(self._histories) > MOST_CLIENTS:
            self._histories.popitem(last=False)
        return self._histories[client]
