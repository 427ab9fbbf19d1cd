"""The hooks around what SGLang itself does to its weights: releases of memory, and updates by somebody else.

Meanwhile the draft is left alone: weights that were released may not even be read. Afterwards it is looked at, because SGLang
loses drafts there (its issue 31674).
"""

from collections.abc import Callable
from typing import Any

from updraft_sglang import names
from updraft_sglang.weights import LOADER
from updraft_tap.hooks import Binding, Hook
from updraft_tap.swap import Swap
from updraft_tap.weights import UNKNOWN, ServedVersion

ASLEEP = "SGLang has released its weights, so no draft can be swapped in; call /resume_memory_occupation first"
UPDATED = "somebody else updates SGLang's weights, so no draft can be swapped in until that is finished"

_WEIGHTS = "weights"
"""SGLang's tag for them, beside those of the KV cache and of CUDA graphs."""
_TAKES = ("self", "recv_req")
_SESSION = ("begin_weight_update", "end_weight_update")
_UPDATES = ("disk", "distributed", "tensor", "ipc")


class UnprovedDraft:
    """Stands for a Swap where none can read the draft, as of several ranks: whoever touches it leaves it unknown."""

    def __init__(self, served: ServedVersion) -> None:
        self._served = served

    def close(self, _: str) -> None:
        """Somebody else touches the weights."""
        self._served.version, self._served.digest = 0, UNKNOWN

    def open(self, changed: Callable[[], None]) -> None:
        """They are done."""
        changed()


class Reloads:
    """The hook bodies. Each calls `original` once with its own arguments. They do nothing before `watch`."""

    def __init__(self) -> None:
        self._swap: Swap | UnprovedDraft | None = None
        self._changed: Callable[[], None] = lambda: None
        self._is_asleep = False
        self.bindings = (
            Binding(target=f"{names.UPDATES}.release_memory_occupation", hook=self.release, parameters=_TAKES),
            Binding(target=f"{names.UPDATES}.resume_memory_occupation", hook=self.resume, parameters=_TAKES),
            *(Binding(target=f"{names.UPDATES}.{name}", hook=self.session, parameters=_TAKES) for name in _SESSION),
            *(
                Binding(target=f"{names.UPDATES}.update_weights_from_{name}", hook=self.update, parameters=_TAKES)
                for name in _UPDATES
            ),
        )

    def watch(self, swap: Swap | UnprovedDraft, changed: Callable[[], None]) -> None:
        """Guard the draft of this swap from now on. `changed` is called when it may be lost."""
        self._swap, self._changed = swap, changed

    def release(self, original: Hook, manager: Any, recv_req: Any) -> Any:
        """AROUND release_memory_occupation. One that fails half-way has released weights too."""
        if self._swap is not None and _has_weights(recv_req):
            self._is_asleep = True
            self._swap.close(ASLEEP)
        return original(manager, recv_req)

    def resume(self, original: Hook, manager: Any, recv_req: Any) -> Any:
        """AROUND resume_memory_occupation, which may resume the KV cache alone."""
        result = original(manager, recv_req)
        if self._swap is not None and _has_weights(recv_req):
            self._is_asleep = False
            self._open(manager)
        return result

    def session(self, original: Hook, manager: Any, recv_req: Any) -> Any:
        """AROUND the begin and the end of an update, which may pack weights.

        Drafts of several ranks are swapped by such an update, so for them it alone is no reason to doubt.
        """
        is_unproved = isinstance(self._swap, UnprovedDraft)
        return original(manager, recv_req) if is_unproved else self._around(original, manager, recv_req)

    def update(self, original: Hook, manager: Any, recv_req: Any) -> Any:
        """AROUND what replaces weights, but for our own loader. An update that fails is at an end."""
        is_ours = getattr(recv_req, "load_format", None) == LOADER
        return original(manager, recv_req) if is_ours else self._around(original, manager, recv_req)

    def _around(self, original: Hook, manager: Any, recv_req: Any) -> Any:
        if self._swap is None:
            return original(manager, recv_req)
        self._swap.close(UPDATED)
        try:
            return original(manager, recv_req)
        finally:
            self._open(manager)

    def _open(self, manager: Any) -> None:
        assert self._swap is not None
        if self._is_asleep:
            self._swap.close(ASLEEP)
        elif isinstance(self._swap, UnprovedDraft) or getattr(manager, "_session", None) is None:
            self._swap.open(self._changed)


def _has_weights(recv_req: Any) -> bool:
    """No tags are all of them."""
    return not recv_req.tags or _WEIGHTS in recv_req.tags
