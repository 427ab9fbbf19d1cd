"""Deltas on their way from the engine's thread to the event loops that wait for them.

An event loop that wakes takes the interpreter's lock, and a core, from the step that runs: it is woken once a step, not once
a request.
"""

import asyncio
from collections import defaultdict
from contextlib import suppress

from updraft_inference.engine import Delta

Reader = asyncio.Queue[Delta | None]


class DeltaQueue:
    """Of the engine's thread, which alone calls it."""

    def __init__(self) -> None:
        self._held: defaultdict[asyncio.AbstractEventLoop, list[tuple[Reader, Delta]]] = defaultdict(list)

    def put(self, loop: asyncio.AbstractEventLoop, reader: Reader, delta: Delta) -> None:
        """For a reader on this loop, at the next delivery."""
        self._held[loop].append((reader, delta))

    def deliver(self) -> None:
        """Hand over all that was put."""
        for loop, deltas in self._held.items():
            with suppress(RuntimeError):  # it is closed, and nobody reads there
                loop.call_soon_threadsafe(_put_all, deltas)
        self._held.clear()


def _put_all(deltas: list[tuple[Reader, Delta]]) -> None:
    for reader, delta in deltas:
        reader.put_nowait(delta)
