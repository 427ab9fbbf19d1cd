"""For how long reading a draft's file stops another thread of the process, as the engine's thread is one.

In Python, work in one call may keep the interpreter's lock. A thread that does nothing but look at the clock shows that by its
longest gap. Gaps in as long a time without work are what other programs cause.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from bench.harness import Line, spread
from safetensors.torch import save_file

from updraft_cli import results
from updraft_tap import checkpoint

MB = 200
TIMES = 9
MOST_MS = 30.0
_SWITCH_S = 0.0005
"""How soon a thread that waits for the lock asks for it."""


@dataclass(slots=True)
class Clock:
    """The longest time between two looks at the clock since `gap_ms` was last asked."""

    is_over: bool = False
    looks: threading.Event = field(default_factory=threading.Event)
    """Set once it has looked."""
    _gaps_s: list[float] = field(default_factory=list)

    def watch(self) -> None:
        """Until it is over."""
        last_s = time.perf_counter()
        self.looks.set()
        while not self.is_over:
            now_s = time.perf_counter()
            if now_s - last_s > _SWITCH_S:
                self._gaps_s.append(now_s - last_s)
            last_s = now_s

    def gap_ms(self, work: Callable[[], object]) -> float:
        """The longest one while this ran."""
        self._gaps_s.clear()
        kept = work()  # freeing it is no part of it
        found = 1e3 * max(self._gaps_s, default=0.0)
        del kept
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """Milliseconds, by time: while the file was read, and without work."""

    reading_ms: list[float]
    nothing_ms: list[float]

    def line(self) -> Line:
        """The bar."""
        name = f"added to another thread's longest gap while a draft of {MB} MB is read, median"
        added_ms = [reading - nothing for reading, nothing in zip(self.reading_ms, self.nothing_ms, strict=True)]
        note = f"{median(self.reading_ms):.1f} ms; {median(self.nothing_ms):.1f} ms without work"
        return Line(results.at_most(name, median(added_ms), MOST_MS, "ms"), spread(added_ms), note)


def measured(folder: Path) -> Gaps:
    """A file in the system's cache, read some times, and as much waiting in turn."""
    folder.mkdir()
    save_file({"weight": torch.zeros(MB << 18)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    checkpoint.read(folder)
    started_s = time.perf_counter()
    checkpoint.read(folder)
    took_s = time.perf_counter() - started_s
    gaps = Gaps(reading_ms=[], nothing_ms=[])
    with _watched() as clock:
        for _ in range(TIMES):
            gaps.reading_ms.append(clock.gap_ms(lambda: checkpoint.read(folder)))
            gaps.nothing_ms.append(clock.gap_ms(lambda: time.sleep(took_s)))
    return gaps


@contextmanager
def _watched() -> Iterator[Clock]:
    before_s, clock = sys.getswitchinterval(), Clock()
    sys.setswitchinterval(_SWITCH_S)
    thread = threading.Thread(target=clock.watch)
    thread.start()
    try:
        clock.looks.wait()
        yield clock
    finally:
        clock.is_over = True
        thread.join()
        sys.setswitchinterval(before_s)
