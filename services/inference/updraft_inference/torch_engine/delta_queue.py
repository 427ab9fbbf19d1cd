"""Deltas on their way from the engine's thread to event loops.

An event loop that wakes takes the interpreter's lock and a core from the running step, so it is woken once per step, not once
per request.
"""

import asyncio
from collections import defaultdict
from contextlib import suppress

from updraft_inference.engine import Delta

Reader = asyncio.Queue[Delta | None]


class DeltaQueue:
    """Used by the engine's thread only."""

    def __init__(self) -> None:
        self._held: defaultdict[asyncio.AbstractEventLoop, list[tuple[Reader, Delta]]] = defaultdict(list)

    def put(self, loop: asyncio.AbstractEventLoop, reader: Reader, delta: Delta) -> None:
        self._held[loop].append((reader, delta))

    def deliver(self) -> None:
        for loop, deltas in self._held.items():
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_put_all, deltas)
        self._held.clear()


def _put_all(deltas: list[tuple[Reader, Delta]]) -> None:
    for reader, delta in deltas:
        reader.put_nowait(delta)
