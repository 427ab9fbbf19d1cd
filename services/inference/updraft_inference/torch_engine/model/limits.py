"""Sizes that are fixed while the engine runs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`max_context` counts prompt and output tokens of a request. `max_lookahead` bounds the draft model's chains, `max_lookup`
    n-gram proposals. `num_remembered`: tokens of earlier answers per client that n-gram lookup searches too."""

    num_slots: int
    max_context: int
    max_lookahead: int
    max_lookup: int = 10
    num_remembered: int = 0

    @property
    def num_positions(self) -> int:
        """Cache positions per slot; drafts may reach beyond the context."""
        return self.max_context + self.max_lookahead + 1
