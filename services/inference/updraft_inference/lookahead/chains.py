"""What a draft model's chains cost: seconds a token of all chains together.

A sequence whose drafts were looked up for some steps is behind: the model reads what it left out before it drafts. That is
no cost of drafting, for it is read in the end whether anybody drafts or not (`torch_engine/eagle.py`).
"""

from dataclasses import dataclass, field

from updraft_inference.lookahead.cost import OUTLIER, CostTable, Factor

_SHARE = 0.1
"""Of a target's forward, for one token of each chain, until it was measured; and for a row that was left out."""
_LEAST = 0.05
"""Of that share."""


@dataclass(slots=True)
class ChainCost:
    """Learned while serving; costs of other numbers of sequences are in the proportion of the target's."""

    table: CostTable
    _factors: dict[int, Factor] = field(default_factory=dict)
    """Of what is assumed, by number of sequences."""

    def token(self, sequences: int) -> float:
        """Seconds for one more token of each chain."""
        nearest = min(self._factors, key=lambda known: (abs(known - sequences), known), default=None)
        factor = 1.0 if nearest is None else self._factors[nearest].value
        return factor * _SHARE * self.table.alone(sequences)

    def reading(self, *, sequences: int, length: int, behind: int) -> float:
        """Seconds that chains took longer because the model had first to read `behind` rows of all sequences together."""
        more = max(0, behind - sequences * (length + 1))
        return _SHARE * (self.table.alone(sequences + more) - self.table.alone(sequences))

    def observe(self, *, sequences: int, length: int, behind: int, seconds: float) -> None:
        """Chains were made, after the model had read what they were behind."""
        alone = self.table.alone(sequences)
        expected = self.token(sequences) / (_SHARE * alone)
        token_s = (seconds - self.reading(sequences=sequences, length=length, behind=behind)) / length
        seen = max(_LEAST, token_s / (_SHARE * alone))  # nothing is free: what rows alone explain was a lucky step
        self._factors.setdefault(sequences, Factor(expected)).add(min(seen, OUTLIER * expected))
