"""A process whose loop has nothing to do, beside the same load: what it shows of standstills is the machine's part.

A thread copies memory without Python's lock, a twentieth of the time. So the process uses processor time while its loop waits,
as those that are measured do, and nothing of this process ever holds its loop.
"""

import asyncio
import time

import numpy as np

from updraft_chassis.lifecycle import Stop

_BYTES = 16 * 1024 * 1024
_IDLE = 19
"""Times as long as a copy took."""


async def serve(stop: Stop) -> None:
    """Copy until `stop`."""
    await asyncio.to_thread(_copy, stop)


def _copy(stop: Stop) -> None:
    source, target = np.ones(_BYTES, np.uint8), np.ones(_BYTES, np.uint8)
    while not stop.requested:
        began_s = time.thread_time()
        np.copyto(target, source)
        time.sleep(_IDLE * (time.thread_time() - began_s))
