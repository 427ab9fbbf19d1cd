"""What a draft model's chains cost: seconds a token of all chains together, and seconds a row that it has to read before.

A sequence whose drafts were looked up for some steps is behind: the model reads what it left out before it drafts. Without that
cost, taking turns with lookups would look cheaper than it is.
"""

from dataclasses import dataclass, field

from updraft_inference.lookahead.cost import CostTable

_SHARE = 0.1
"""Of a target's forward, for one token of each chain, until it was measured."""
_DECAY, _OUTLIER = 0.05, 2.0


@dataclass(slots=True)
class ChainCost:
    """Learned while serving; costs of other numbers of sequences are in the proportion of the target's."""

    table: CostTable
    _token_s: dict[int, float] = field(default_factory=dict)
    """By number of sequences."""
    _row_s: float | None = None

    def token(self, sequences: int) -> float:
        """Seconds for one more token of each chain."""
        if not self._token_s:
            return _SHARE * self.table.alone(sequences)
        nearest = min(self._token_s, key=lambda known: (abs(known - sequences), known))
        return self._token_s[nearest] * self.table.alone(sequences) / self.table.alone(nearest)

    def entry(self, behind: int, length: int) -> float:
        """Seconds to read, for chains of `length` tokens, what a sequence is more behind than one that always drafts."""
        return (self._row_s or 0.0) * max(0, behind - length - 1)

    def observe(self, *, sequences: int, length: int, behind: int, seconds: float) -> None:
        """Chains were made, after the model had read `behind` rows of all sequences together."""
        more = behind - sequences * (length + 1)
        if more <= 0:
            each = seconds / length
            self._token_s[sequences] = _nearer(self._token_s.get(sequences), each)
        elif self._token_s:
            self._row_s = _nearer(self._row_s, max(0.0, seconds - length * self.token(sequences)) / more)


def _nearer(before: float | None, seen: float) -> float:
    """A decayed mean in which nothing counts for more than some times what was expected."""
    if before is None:
        return seen
    return before + (min(seen, _OUTLIER * before) - before) * _DECAY
