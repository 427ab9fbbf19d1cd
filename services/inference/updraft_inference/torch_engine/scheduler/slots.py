"""Which slots are free, and which prefixes the released ones still hold."""

from collections.abc import Iterable
from dataclasses import replace

from updraft_inference.torch_engine.scheduler.prefix_cache import CachedPrefix, PrefixMatch, longest

MIN_PREFIX = 8
"""A shorter common prefix is not worth copying."""


class Slots:
    """The slots of a cache. A released slot keeps its rows until it is taken again."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))
        self._released: dict[int, CachedPrefix] = {}

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def find(
        self, prompt: list[int], running: Iterable[CachedPrefix], *, client: str, most: int, with_draft: bool
    ) -> PrefixMatch:
        """The longest cached prefix of the client's prompt; see `prefix_cache.longest`.

        Other clients' requests are never used, because the time to the first token would reveal what they had asked.
        """
        own = [prefix for prefix in (*self._released.values(), *running) if prefix.client == client]
        match = longest(prompt, own, most=most, with_draft=with_draft)
        return match if match.length >= MIN_PREFIX else PrefixMatch()

    def take(self, running: Iterable[CachedPrefix], match: PrefixMatch) -> int:
        """A free slot, if possible the one with the matching prefix."""
        slot = self._best([prefix.slot for prefix in running], match.slot)
        self._free.remove(slot)
        self._released.pop(slot, None)
        return slot

    def release(self, prefix: CachedPrefix) -> None:
        self._released[prefix.slot] = prefix
        self._free.append(prefix.slot)

    def forget(self, slot: int) -> None:
        """The rows of this free slot are of no use."""
        del self._released[slot]

    def forget_drafts(self) -> None:
        """The draft's rows are of no use."""
        self._released = {slot: replace(prefix, num_computed_draft_tokens=0) for slot, prefix in self._released.items()}

    def _best(self, used: list[int], wanted: int) -> int:
        """The free slot nearest to those in use, because neighbours are read in place. Of several the wanted one, else an
        empty one, else the one released first, so that cached prefixes last."""
        ages = {slot: age for age, slot in enumerate(self._released, start=1)}

        def rank(slot: int) -> tuple[int, bool, int]:
            return max([*used, slot]) - min([*used, slot]), slot != wanted, ages.get(slot, 0)

        return min(self._free, key=rank)
