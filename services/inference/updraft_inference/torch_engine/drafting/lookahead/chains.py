"""What a draft model's chains cost: seconds a token of all chains together.

A sequence whose drafts were looked up for some steps is behind: the model reads what it left out before it drafts. That is
no cost of drafting, for it is read in the end whether anybody drafts or not (`torch_engine/eagle.py`).
"""

from dataclasses import dataclass, field

from updraft_inference.torch_engine.drafting.lookahead.cost import OUTLIER, CostTable, Factor

_SHARE = 0.1
"""Of a target's forward, for one token of each chain, until it was measured."""


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

    def observe(self, *, sequences: int, length: int, behind: int, seconds: float) -> float:
        """Chains were made, after the model had read `behind` rows of all sequences together. -> Seconds of that reading: in
        the proportion in which a target's forward takes longer for rows that drafting alone would not have read."""
        alone, more = self.table.alone(sequences), max(0, behind - sequences * (length + 1))
        drafting = length * alone
        share = drafting / (drafting + self.table.alone(sequences + more) - alone)
        expected = self.token(sequences) / (_SHARE * alone)
        seen = share * seconds / (_SHARE * drafting)
        self._factors.setdefault(sequences, Factor(expected)).add(min(seen, OUTLIER * expected))
        return (1 - share) * seconds
