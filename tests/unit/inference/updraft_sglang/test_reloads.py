"""What SGLang does to its weights by itself, on a stand-in for its updater and for the swap."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from updraft_sglang.draft import ASLEEP
from updraft_sglang.reloads import UPDATED, Reloads, UnprovedDraft
from updraft_sglang.weights import LOADER
from updraft_tap.weights import UNKNOWN, ServedVersion


class Swap:
    """Whether the weights may be touched."""

    def __init__(self) -> None:
        self.closed = ""

    def close(self, reason: str) -> None:
        self.closed = reason

    def open(self, changed: Callable[[], None]) -> None:
        self.closed = ""
        changed()


class Sglang:
    """An updater whose methods are hooked."""

    def __init__(self, swap: Any) -> None:
        self.swap = swap
        self.seen: list[str] = []
        self.changes = 0
        self.manager = SimpleNamespace(_session=None)
        self._reloads = Reloads()
        if swap is not None:
            self._reloads.watch(swap, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def call(self, name: str, error: Exception | None = None, **fields: Any) -> None:
        """As SGLang calls the method of that name."""

        def original(manager: Any, received: Any) -> str:
            self.seen.append(getattr(self.swap, "closed", ""))
            if name == "begin_weight_update":
                manager._session = "open"
            if name == "end_weight_update":
                manager._session = None
            if error is not None:
                raise error
            return "done"

        (hook,) = (one.hook for one in self._reloads.bindings if one.target.endswith(f".{name}"))
        assert hook(original, self.manager, SimpleNamespace(**fields)) == "done"


@pytest.fixture
def sglang() -> Sglang:
    return Sglang(Swap())


@pytest.mark.parametrize("tags", [None, [], ["weights", "kv_cache"]])
def test_released_weights_are_left_alone_until_they_are_back(sglang: Sglang, tags: list[str] | None) -> None:
    sglang.call("release_memory_occupation", tags=tags)
    sglang.call("resume_memory_occupation", tags=["kv_cache"])
    assert (sglang.swap.closed, sglang.changes) == (ASLEEP, 0)

    sglang.call("resume_memory_occupation", tags=tags)

    assert (sglang.swap.closed, sglang.changes) == ("", 1)


def test_a_released_kv_cache_is_no_loss_of_the_draft(sglang: Sglang) -> None:
    sglang.call("release_memory_occupation", tags=["kv_cache"])
    assert (sglang.swap.closed, sglang.changes) == ("", 0)


@pytest.mark.parametrize("kind", ["disk", "distributed", "tensor", "ipc"])
def test_after_somebody_elses_update_the_draft_is_looked_at_even_if_it_failed(sglang: Sglang, kind: str) -> None:
    sglang.call(f"update_weights_from_{kind}")
    with pytest.raises(RuntimeError, match="of SGLang"):
        sglang.call(f"update_weights_from_{kind}", error=RuntimeError("of SGLang"))

    assert sglang.seen == [UPDATED, UPDATED]
    assert (sglang.swap.closed, sglang.changes) == ("", 2)


def test_an_update_in_parts_lasts_until_its_end(sglang: Sglang) -> None:
    sglang.call("begin_weight_update", selector="draft")
    sglang.call("update_weights_from_tensor", load_format=None)
    assert (sglang.swap.closed, sglang.changes) == (UPDATED, 0)

    sglang.call("end_weight_update")

    assert (sglang.swap.closed, sglang.changes) == ("", 1)


def test_weights_that_are_updated_while_they_are_released_stay_closed(sglang: Sglang) -> None:
    sglang.call("release_memory_occupation", tags=None)
    sglang.call("update_weights_from_disk")
    assert (sglang.swap.closed, sglang.changes) == (ASLEEP, 0)


def test_a_draft_of_several_ranks_is_unknown_after_any_update_but_that_of_its_own_agent() -> None:
    served = ServedVersion()
    served.version, served.digest = 7, "sha256:7"
    sglang = Sglang(UnprovedDraft(served))
    sglang.call("begin_weight_update")
    sglang.call("update_weights_from_tensor", load_format=LOADER)
    sglang.call("end_weight_update")
    assert (served.version, served.digest, sglang.changes) == (7, "sha256:7", 0)

    sglang.call("update_weights_from_disk")

    assert (served.version, served.digest, sglang.changes) == (0, UNKNOWN, 1)


def test_in_a_server_without_a_draft_updates_pass() -> None:
    sglang = Sglang(None)
    sglang.call("release_memory_occupation", tags=None)
    sglang.call("resume_memory_occupation", tags=None)
    sglang.call("update_weights_from_disk")
    assert sglang.seen == ["", "", ""]
