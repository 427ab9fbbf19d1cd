"""Records how long an event loop stands still, and the memory of its process, as lines of JSON in a file.

A wake-up is late because code of this process holds the loop or Python's lock, or because the machine has no free core: for
the loop's thread, or for another thread that holds the lock meanwhile. The kernel counts how long the loop's thread waited for
a core (its run delay), and no process can hold its own loop for longer than all its threads were running. So `held_ms` is the
smaller of the lateness without the run delay, and the processor time of the process meanwhile. A loop that waits for a disk
uses none, so this does not see that; `late_ms` does.
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
class Standstill:
    """How late a wake-up was, in milliseconds. `held_ms` without the machine's part, `own_ms` the loop's own processor time."""

    late_ms: float
    held_ms: float
    own_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Second:
    """The longest standstills of about half a second, each by its own measure, and the resident memory and the processor time
    of the process at its end."""

    at_s: float
    longest: Standstill
    resident_bytes: int
    cpu_s: float


@dataclass(frozen=True, slots=True)
class _Times:
    """Clocks in seconds: of the wall, the wait of the loop's thread for a core, its processor time, and the process's."""

    wall: float
    waited: float
    own: float
    process: float

    def until(self, then: "_Times") -> Standstill:
        """The standstill between two wake-ups that should be `PERIOD_S` apart."""
        late = max(0.0, then.wall - self.wall - PERIOD_S)
        held = min(late - (then.waited - self.waited), then.process - self.process)
        return Standstill(late_ms=1000 * late, held_ms=max(0.0, 1000 * held), own_ms=1000 * (then.own - self.own))


async def record(path: Path) -> None:
    """Watch the running loop until cancelled."""
    process, thread = psutil.Process(), Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    with path.open("a", buffering=1) as lines, thread.open("rb", buffering=0) as schedstat:  # noqa: ASYNC230 - no disk

        def now() -> _Times:
            schedstat.seek(0)
            waited = int(schedstat.read().split()[1]) / 1e9
            return _Times(time.perf_counter(), waited, time.thread_time(), time.process_time())

        while True:
            longest, before = Standstill(late_ms=0, held_ms=0, own_ms=0), now()
            ends = before.wall + LINE_S
            while before.wall < ends:
                await asyncio.sleep(PERIOD_S)
                after = now()
                longest, before = most([longest, before.until(after)]), after
            figures = [longest.late_ms, longest.held_ms, longest.own_ms, process.memory_info().rss, before.process]
            lines.write(f"{json.dumps([time.time(), *figures])}\n")


def most(standstills: list[Standstill]) -> Standstill:
    """The most of each measure."""
    return Standstill(
        late_ms=max(one.late_ms for one in standstills),
        held_ms=max(one.held_ms for one in standstills),
        own_ms=max(one.own_ms for one in standstills),
    )


def read(path: Path, since_s: float) -> list[Second]:
    """The lines that began after a time, in Unix seconds: what a process did before, as its start, is not of the run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        Second(
            at_s=at_s,
            longest=Standstill(late_ms=late_ms, held_ms=held_ms, own_ms=own_ms),
            resident_bytes=resident,
            cpu_s=cpu_s,
        )
        for at_s, late_ms, held_ms, own_ms, resident, cpu_s in lines
        if at_s - LINE_S >= since_s
    ]
