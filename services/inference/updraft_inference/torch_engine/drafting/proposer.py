"""The interface of a proposer. A new one implements it and is added to `Speculation` and to `lookahead/policy.py`.

`ngram.py` and `eagle.py` are the two there are. The engine's thread makes all calls.
"""

from typing import Protocol

from torch import Tensor

from updraft_inference.torch_engine.proposal import Proposal
from updraft_inference.torch_engine.sequence import Sequence


class Proposer(Protocol):
    """Proposes tokens for running sequences."""

    def propose(self, sequences: list[Sequence], k: int) -> list[Proposal]:
        """At most `k` tokens for each sequence, ordered by slot.

        RuntimeError: proposing failed. The sequences then go on without this proposer, which gets a `forget` for each.
        """
        ...

    def observe(self, sequence: Sequence, aux_RA: Tensor) -> None:
        """The target has accepted positions; `aux_RA` are their auxiliary states, at least one row."""
        ...

    def keep_up(self, sequences: list[Sequence]) -> None:
        """Do a bounded amount of background work. Called once per step."""
        ...

    def finish(self, sequence: Sequence) -> None:
        """The request has ended by itself."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """Drop all state of a sequence that will not draft again."""
        ...
