"""What followed the last time, in the request's own text or in earlier answers to its client: the longer match is taken.

Of two that are as long the request's own is; `python -m bench.serving.lookups` tells how good both are. Clients are kept
apart: how fast an answer comes tells whether it was foreseen, and that may tell a client nothing of what others were told.
"""

from collections import OrderedDict

from updraft_inference.torch_engine.history import History
from updraft_inference.torch_engine.ngram import Lookup
from updraft_inference.torch_engine.sequence import Sequence

MOST_CLIENTS = 16
"""Who asked nothing for longest is forgotten for a new one."""


class Lookups:
    """Remembers `num_tokens` tokens of answers a client; 0: none."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._histories: OrderedDict[str, History] = OrderedDict()

    def propose(self, sequence: Sequence, k: int) -> Lookup:
        """At most `k` tokens."""
        own = sequence.index.propose(sequence.ids, k)
        history = self._histories.get(sequence.request.client)
        if history is None:
            return own
        other = history.propose(sequence.ids, k, longer_than=own.kind.matched)
        return other if other.ids else own

    def remember(self, sequence: Sequence) -> None:
        """Its answer as far as it got."""
        if not (self._num_tokens and sequence.num_output):
            return
        client = sequence.request.client
        history = self._histories.pop(client, None) or History(self._num_tokens)
        self._histories[client] = history
        if len(self._histories) > MOST_CLIENTS:
            self._histories.popitem(last=False)
        history.add(sequence.ids, sequence.num_prompt)
