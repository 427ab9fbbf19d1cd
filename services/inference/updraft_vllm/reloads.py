"""The hooks around what vLLM itself does to its weights: sleep, and updates by somebody else.

Meanwhile the draft is left alone: weights that sleep has freed may not even be read. Afterwards it is looked at, because
vLLM loses drafts there (its issue 52487).
"""

from collections.abc import Callable
from typing import Any

from updraft_tap.hooks import Binding, Hook
from updraft_tap.swap import Swap

ASLEEP = "vLLM sleeps, so no draft can be swapped in; wake it up first"
UPDATED = "somebody else updates vLLM's weights, so no draft can be swapped in until that is finished"

_WEIGHTS = "weights"
"""vLLM's tag for them, beside that of the KV cache."""


class Reloads:
    """The hook bodies. Each calls `original` once with its own arguments. `changed` is called when a draft may be lost."""

    def __init__(self, swap: Swap, changed: Callable[[], None]) -> None:
        self._swap = swap
        self._changed = changed
        self._is_asleep = False

    def bindings(self, worker: str) -> tuple[Binding, ...]:
        """The hooks of a class of workers, by its dotted name."""
        bodies: dict[str, Hook] = {
            "sleep": self.sleep,
            "discard": self.discard,
            "wake_up": self.wake_up,
            "checkpoint_prepare": self.sleep,
            "checkpoint_restore": self.wake_up,
            "start_weight_update": self.update,
            "start_draft_weight_update": self.update,
            "update_weights": self.update,
            "finish_weight_update": self.update,
            "reload_weights": self.update,
        }
        return tuple(
            Binding(target=f"{worker}.{name}", hook=body, parameters=("self",)) for name, body in bodies.items()
        )

    def sleep(self, original: Hook, worker: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND sleep. One that fails half-way has freed weights too."""
        self._is_asleep = True
        self._swap.close(ASLEEP)
        return original(worker, *args, **kwargs)

    def discard(self, original: Hook, worker: Any, tags: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND discard, which frees what the tags say for good."""
        if _WEIGHTS in tags:
            return self.sleep(original, worker, tags, *args, **kwargs)
        return original(worker, tags, *args, **kwargs)

    def wake_up(self, original: Hook, worker: Any, tags: Any = None, *args: Any, **kwargs: Any) -> Any:
        """AROUND wake_up, which may wake up the KV cache alone."""
        result = original(worker, *(() if tags is None else (tags,)), *args, **kwargs)
        if tags is None or _WEIGHTS in tags:
            self._is_asleep = False
            self._open(worker)
        return result

    def update(self, original: Hook, worker: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND the parts of an update, and what replaces weights at once. An update that fails is at an end."""
        self._swap.close(UPDATED)
        try:
            return original(worker, *args, **kwargs)
        finally:
            self._open(worker)

    def _open(self, worker: Any) -> None:
        if self._is_asleep:
            self._swap.close(ASLEEP)
        elif not getattr(worker, "_weight_update_active", False):
            self._swap.open(self._changed)
