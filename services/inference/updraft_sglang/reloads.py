"""The hooks around SGLang's own changes to its weights: releases of memory, and updates by someone else.

During these, the plugin does not touch the draft: released weights may not even be read. Afterwards it checks the draft,
because SGLang can lose it (SGLang's issue 31674).
"""

from collections.abc import Callable
from typing import Any

from updraft_sglang import names
from updraft_sglang.draft import ASLEEP
from updraft_sglang.weights import LOADER, preparation
from updraft_tap.hooks import Binding, Hook
from updraft_tap.swap import Swap
from updraft_tap.weights import UNKNOWN, ServedVersion

UPDATED = "someone else is updating SGLang's weights, so no draft can be swapped in until the update ends"

_TAKES = ("self", "recv_req")
_SESSION = ("begin_weight_update", "end_weight_update")
_UPDATES = ("disk", "distributed", "tensor", "ipc")


class UnprovedDraft:
    """Replaces a Swap if the draft cannot be read back, as with several ranks: after any change it is unknown."""

    def __init__(self, served: ServedVersion) -> None:
        self._served = served

    def close(self, _: str) -> None:
        """Someone else starts to change the weights."""
        self._served.version, self._served.digest = 0, UNKNOWN
        preparation.forget()

    def open(self, changed: Callable[[], None]) -> None:
        """The change has ended."""
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
        """AROUND release_memory_occupation, which may release weights even if it fails."""
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
        """AROUND the beginning and the end of an update, which may pack weights.

        Drafts of several ranks are swapped by such an update, so it does not make them unknown.
        """
        is_unproved = isinstance(self._swap, UnprovedDraft)
        return original(manager, recv_req) if is_unproved else self._around(original, manager, recv_req)

    def update(self, original: Hook, manager: Any, recv_req: Any) -> Any:
        """AROUND the functions that replace weights, except with our own loader. A failed update has ended too."""
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
    """Whether the tags include weights; without tags, all are meant."""
    return not recv_req.tags or names.WEIGHTS in recv_req.tags
