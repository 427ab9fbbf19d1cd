"""Deltas reach their readers in order, and an event loop is woken once for all of a step."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from updraft_inference.engine import Delta
from updraft_inference.torch_engine.worker import DeltaQueue, Reader


async def test_a_loop_is_woken_once_for_all_that_was_put(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    woken: list[object] = []
    wake = loop.call_soon_threadsafe

    def counted(callback: Callable[..., object], *args: Any) -> asyncio.Handle:
        woken.append(callback)
        return wake(callback, *args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    readers: list[Reader] = [asyncio.Queue(), asyncio.Queue()]
    delta_queue = DeltaQueue()
    for token in range(3):
        for reader in readers:
            delta_queue.put(loop, reader, Delta(token_ids=(token,)))
    await asyncio.to_thread(delta_queue.deliver)
    await asyncio.to_thread(delta_queue.deliver)

    for reader in readers:
        assert [(await reader.get()).token_ids for _ in range(3)] == [(0,), (1,), (2,)]  # type: ignore[union-attr]
    assert len(woken) == 1 + 2, "one delivery, and the two threads that were waited for"
