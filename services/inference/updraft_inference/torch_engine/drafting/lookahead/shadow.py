"""What a lookup would have proposed, scored against what came: acceptance without the cost of a verification."""

from dataclasses import dataclass, field

from updraft_inference.torch_engine.drafting.lookahead.kind import NOTHING, ProposalSource


@dataclass(frozen=True, slots=True)
class Score:
    """Of one proposal: its first `kept` tokens came, and then another one did (`is_refused`) or it had no more."""

    kind: ProposalSource
    kept: int
    is_refused: bool


@dataclass(slots=True)
class Shadow:
    """The proposal of one sequence that waits for the tokens it foretells. While it waits, no other is taken."""

    _ids: list[int] = field(default_factory=list)
    _kind: ProposalSource = NOTHING
    _kept: int = 0

    def take(self, ids: list[int], kind: ProposalSource) -> None:
        """Watch a proposal for the next tokens, unless one is watched."""
        if not self._ids:
            self._ids, self._kind, self._kept = ids, kind, 0

    def score(self, came: list[int]) -> Score | None:
        """Compare with the tokens that came next; the score once it is known."""
        if not self._ids:
            return None
        for token in came:
            is_refused = token != self._ids[self._kept]
            self._kept += not is_refused
            if is_refused or self._kept == len(self._ids):
                self._ids = []
                return Score(self._kind, self._kept, is_refused)
        return None
