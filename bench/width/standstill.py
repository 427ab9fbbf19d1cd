"""Records how long an event loop stands still, and the memory of its process, as lines of JSON in a file.

A late wake-up has two causes: code that holds the loop or the interpreter's lock, and a machine without a free core. The
kernel counts the second (the run delay of the thread), so `held_ms` is the lateness without it.
"""

import asyncio
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

PERIOD_S = 0.005
LINE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Second:
    """The longest standstill of about half a second, and the resident memory at its end."""

    at_s: float
    late_ms: float
    held_ms: float
    resident_bytes: int


async def record(path: Path) -> None:
    """Watch the running loop until cancelled."""
    process, thread = psutil.Process(), Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    with path.open("a", buffering=1) as lines, thread.open("rb", buffering=0) as schedstat:  # noqa: ASYNC230 - no disk
        while True:
            late = held = 0.0
            ends = time.perf_counter() + LINE_S
            waited = _waited_s(schedstat.read())
            while (began := time.perf_counter()) < ends:
                await asyncio.sleep(PERIOD_S)
                lateness = time.perf_counter() - began - PERIOD_S
                schedstat.seek(0)
                waited, before = _waited_s(schedstat.read()), waited
                late, held = max(late, lateness), max(held, lateness - (waited - before))
            schedstat.seek(0)
            resident = process.memory_info().rss
            lines.write(f"{json.dumps([time.time(), 1000 * late, 1000 * held, resident])}\n")


def read(path: Path, since_s: float) -> list[Second]:
    """The lines written since a time, in Unix seconds."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        Second(at_s=at_s, late_ms=late_ms, held_ms=held_ms, resident_bytes=resident)
        for at_s, late_ms, held_ms, resident in lines
        if at_s >= since_s
    ]


def _waited_s(schedstat: bytes) -> float:
    return int(schedstat.split()[1]) / 1e9
