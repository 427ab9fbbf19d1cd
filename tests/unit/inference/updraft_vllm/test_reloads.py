"""What vLLM does to its weights by itself, on a stand-in for a worker and for the swap."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from updraft_vllm.reloads import ASLEEP, UPDATED, Reloads


class Swap:
    """Whether the weights may be touched."""

    def __init__(self) -> None:
        self.closed = ""

    def close(self, reason: str) -> None:
        self.closed = reason

    def open(self, changed: Callable[[], None]) -> None:
        self.closed = ""
        changed()


class Vllm:
    """A worker whose methods are hooked."""

    def __init__(self) -> None:
        self.swap = Swap()
        self.seen: list[tuple[str, str]] = []
        self.changes = 0
        self.worker = SimpleNamespace(_weight_update_active=False)
        self._reloads = Reloads(self.swap, self._changed)  # type: ignore[arg-type]  # stands for it

    def _changed(self) -> None:
        self.changes += 1

    def call(self, name: str, *args: Any, error: Exception | None = None, **kwargs: Any) -> None:
        """As vLLM calls the method of that name."""

        def original(worker: Any, *args: Any, **kwargs: Any) -> None:
            self.seen.append((name, self.swap.closed))
            if name in ("start_weight_update", "start_draft_weight_update"):
                worker._weight_update_active = True
            if error is not None or name == "finish_weight_update":
                worker._weight_update_active = False
            if error is not None:
                raise error

        (hook,) = (one.hook for one in self._reloads.bindings("w.Worker") if one.target == f"w.Worker.{name}")
        hook(original, self.worker, *args, **kwargs)


@pytest.fixture
def vllm() -> Vllm:
    return Vllm()


@pytest.mark.parametrize("tags", [{}, {"tags": None}, {"tags": ["weights"]}])
def test_weights_are_left_alone_from_sleep_until_they_are_awake(vllm: Vllm, tags: dict[str, Any]) -> None:
    vllm.call("sleep", 2)
    vllm.call("wake_up", tags=["kv_cache"])
    assert (vllm.swap.closed, vllm.changes) == (ASLEEP, 0)

    vllm.call("wake_up", **tags)
    assert (vllm.swap.closed, vllm.changes) == ("", 1)
    assert vllm.seen[0] == ("sleep", ASLEEP)


def test_a_sleep_that_fails_may_have_freed_weights(vllm: Vllm) -> None:
    with pytest.raises(MemoryError):
        vllm.call("sleep", error=MemoryError())
    assert vllm.swap.closed == ASLEEP


@pytest.mark.parametrize("begin", ["start_weight_update", "start_draft_weight_update"])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_left_alone_while_somebody_else_updates_them(vllm: Vllm, begin: str, *, fails: bool) -> None:
    vllm.call(begin)
    vllm.call("update_weights", {})
    assert (vllm.swap.closed, vllm.changes) == (UPDATED, 0)

    if fails:
        with pytest.raises(ValueError, match="of the test's own"):
            vllm.call("update_weights", {}, error=ValueError("of the test's own"))
    else:
        vllm.call("finish_weight_update")
    assert (vllm.swap.closed, vllm.changes) == ("", 1)


def test_weights_that_were_reloaded_at_once_are_looked_at(vllm: Vllm) -> None:
    vllm.call("reload_weights")
    assert (vllm.seen, vllm.swap.closed, vllm.changes) == ([("reload_weights", UPDATED)], "", 1)


def test_an_update_during_sleep_does_not_end_it(vllm: Vllm) -> None:
    vllm.call("sleep")
    vllm.call("reload_weights")
    assert (vllm.swap.closed, vllm.changes) == (ASLEEP, 0)


def test_the_kv_cache_may_be_discarded_and_weights_are_gone_for_good(vllm: Vllm) -> None:
    vllm.call("discard", ("kv_cache",))
    assert vllm.swap.closed == ""
    vllm.call("discard", ("weights",))
    assert vllm.swap.closed == ASLEEP
