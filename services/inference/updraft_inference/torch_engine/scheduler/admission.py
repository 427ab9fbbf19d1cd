"""Admission: waiting requests get free slots, and with them the cached rows of the longest matching prefix."""

from collections import deque

from updraft_inference.torch_engine.drafting.speculation import Speculation
from updraft_inference.torch_engine.model.kv_cache import SlotCache
from updraft_inference.torch_engine.scheduler.prefix_cache import CachedPrefix, cached_prefix
from updraft_inference.torch_engine.scheduler.slots import Slots
from updraft_inference.torch_engine.sequence import Sequence


class Admission:
    """The queue of requests without a slot, first come, first served; no running request is preempted."""

    def __init__(self, slots: Slots, cache: SlotCache, speculation: Speculation) -> None:
        self.waiting: deque[Sequence] = deque()
        self.num_cached_tokens = 0
        """Prompt tokens so far that were copied instead of computed; read by other threads."""
        self._slots = slots
        self._cache = cache
        self._speculation = speculation

    def admit(self, running: list[Sequence]) -> list[Sequence]:
        """Move as many requests into slots as there are, next to those that run."""
        admitted: list[Sequence] = []
        while self.waiting and self._slots.has_free:
            sequence = self.waiting.popleft()
            self._begin(sequence, [cached_prefix(other) for other in (*running, *admitted)])
            admitted.append(sequence)
        return admitted

    def _begin(self, sequence: Sequence, running: list[CachedPrefix]) -> None:
        sequence.is_draftable = self._speculation.wants_model(sequence)
        capture = sequence.request.capture
        match = self._slots.find(
            sequence.ids,
            running,
            client=sequence.request.client,
            # The last token is always computed, and so are the rows that capture wants.
            most=sequence.num_prompt - max(1, capture.prompt_rows if capture.payload else 0),
            with_draft=sequence.is_draftable,
        )
        sequence.slot = self._slots.take(running, match)
        if match.length and match.slot != sequence.slot:
            self._cache.copy_prefix(match.slot, sequence.slot, match.length)
        sequence.num_computed_tokens = sequence.num_cached = match.length
        self.num_cached_tokens += match.length
        eagle = self._speculation.eagle
        if eagle is not None and sequence.is_draftable and match.length:
            if match.slot != sequence.slot:
                eagle.copy_prefix(match.slot, sequence.slot, match.length)
            sequence.num_computed_draft_tokens = match.length
