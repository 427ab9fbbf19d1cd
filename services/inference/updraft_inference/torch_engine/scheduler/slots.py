"""Who holds which slot, and what those who left theirs can still give to others."""

from collections.abc import Iterable
from dataclasses import replace

from updraft_inference.torch_engine.scheduler.prefix_cache import CachedPrefix, PrefixMatch, longest

MIN_PREFIX = 8
"""Fewer tokens that prompts have in common are not worth looking after."""


class Slots:
    """The slots of a cache. Whoever leaves one leaves what it holds, until it is given away."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))
        self._left: dict[int, CachedPrefix] = {}

    @property
    def has_free(self) -> bool:
        """Somebody can take one."""
        return bool(self._free)

    def find(
        self, prompt: list[int], running: Iterable[CachedPrefix], *, client: str, most: int, with_draft: bool
    ) -> PrefixMatch:
        """What is held already of the client's prompt. See `prefix.longest`.

        Of other clients' requests nothing is taken: how soon an answer begins would tell what they had asked.
        """
        own = [tenant for tenant in (*self._left.values(), *running) if tenant.client == client]
        prefix = longest(prompt, own, most=most, with_draft=with_draft)
        return prefix if prefix.length >= MIN_PREFIX else PrefixMatch()

    def take(self, running: Iterable[CachedPrefix], prefix: PrefixMatch) -> int:
        """A free slot, if possible that of the prefix."""
        slot = self._best([tenant.slot for tenant in running], prefix.slot)
        self._free.remove(slot)
        self._left.pop(slot, None)
        return slot

    def leave(self, tenant: CachedPrefix) -> None:
        """Free a slot, and remember what it holds."""
        self._left[tenant.slot] = tenant
        self._free.append(tenant.slot)

    def forget(self, slot: int) -> None:
        """What this free slot holds is of use to nobody."""
        del self._left[slot]

    def forget_drafts(self) -> None:
        """What the draft has read is of use to nobody."""
        self._left = {slot: replace(tenant, num_computed_draft_tokens=0) for slot, tenant in self._left.items()}

    def _best(self, used: list[int], wanted: int) -> int:
        """A free one, beside those that are used: neighbours are read in place. Of several the one that is wanted, else an
        empty one, else the one that was left first, so that what it holds can be of use for long."""
        ages = {slot: age for age, slot in enumerate(self._left, start=1)}

        def rank(slot: int) -> tuple[int, bool, int]:
            return max([*used, slot]) - min([*used, slot]), slot != wanted, ages.get(slot, 0)

        return min(self._free, key=rank)
