"""How much the engine may hold at once."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes that are fixed while the engine runs. `max_context` counts prompt and output tokens of a request.

    `max_lookahead` is of the draft model's chains, `max_lookup` of what was looked up, which costs nothing to draft.
    `num_remembered` tokens of earlier answers to each client are looked up too.
    """

    num_slots: int
    max_context: int
    max_lookahead: int
    max_lookup: int = 10
    num_remembered: int = 0

    @property
    def num_positions(self) -> int:
        """Cache positions a slot: drafts may reach beyond the context."""
        return self.max_context + self.max_lookahead + 1
