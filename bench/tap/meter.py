"""Counts the CPU time of the plugin's hooks on the thread that calls them. Runs inside the server, where of ours there is only
the plugin.

A hook's own time is that of its call less that of the function that it wraps. After each outermost call the sums so far go to a
file of the process, outside of what is timed.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from updraft_tap.hooks import Binding, Hook

FOLDER = "UPDRAFT_METER"
"""The variable with the folder of the files."""
BYTES = 4096
"""Size of a file, which is written anew in one piece."""
SENDER = "updraft-capture"
"""The name of the channel's thread."""


class Meter:
    """The sums of a process. Its hooks are called by one thread."""

    def __init__(self, file: int, clock: Callable[[], int] = time.thread_time_ns) -> None:
        self._file = file
        self._clock = clock
        self._depth = self._inner_ns = self._nested_ns = self._engine_ns = 0
        self._hooks: dict[str, list[int]] = {}
        self._idle_ns = 0
        self._idle_ns = self._of_nothing()

    def timed(self, target: str, hook: Hook) -> Hook:
        """The hook of this function, timed."""
        return self._timed(".".join(target.split(".")[-2:]), hook)

    def _timed(self, name: str, hook: Hook) -> Hook:
        def timed(original: Hook, *args: Any, **kwargs: Any) -> Any:
            start_ns = self._clock()
            outer_ns, self._inner_ns, self._depth = self._inner_ns, 0, self._depth + 1
            try:
                return hook(self._called(original), *args, **kwargs)
            finally:
                self._ended(name, self._clock() - start_ns - self._inner_ns, outer_ns)

        return timed

    def _called(self, original: Hook) -> Hook:
        def called(*args: Any, **kwargs: Any) -> Any:
            start_ns = self._clock()
            try:
                return original(*args, **kwargs)
            finally:
                self._inner_ns += self._clock() - start_ns

        return called

    def _ended(self, name: str, own_ns: int, outer_ns: int) -> None:
        self._depth -= 1
        own_ns -= self._idle_ns
        sums = self._hooks.setdefault(name, [0, 0])
        sums[0] += 1
        sums[1] += own_ns
        if self._depth:
            self._nested_ns += own_ns
            self._inner_ns = outer_ns
            return
        self._engine_ns += self._inner_ns - self._nested_ns
        self._inner_ns = self._nested_ns = 0
        self._write()

    def _write(self) -> None:
        sums = {"hooks": self._hooks, "engine_ns": self._engine_ns, "sender_ns": sum(map(_cpu_ns, _senders()))}
        os.pwrite(self._file, json.dumps(sums).encode().ljust(BYTES), 0)

    def _of_nothing(self) -> int:
        """The time that a hook which does nothing seems to take."""
        nothing = self._timed("", lambda original: original())
        for _ in range(1000):
            nothing(int)
        calls, own_ns = self._hooks.pop("")
        self._engine_ns = 0
        return own_ns // calls


def _senders() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == SENDER]


def _cpu_ns(thread: threading.Thread) -> int:
    return time.clock_gettime_ns(time.pthread_getcpuclockid(thread.ident)) if thread.ident else 0


def register() -> None:
    """An engine calls this in each of its processes, before the plugin's own. Hooks that are bound from then on are timed."""
    meter = Meter(os.open(Path(os.environ[FOLDER]) / str(os.getpid()), os.O_CREAT | os.O_WRONLY))
    bind: Callable[..., None] = Binding.__init__

    def metered(binding: Binding, **values: Any) -> None:
        bind(binding, **values)
        object.__setattr__(binding, "hook", meter.timed(binding.target, binding.hook))

    Binding.__init__ = metered  # type: ignore[method-assign, assignment] # SGLang installs hooks itself, and the plugin looks for them
