"""Processes in stages: each stage starts when the previous one is ready, and stops before it.

While starting, it fails fast: a child that ends is an error with its last lines. Afterwards, a child that ends is restarted,
and the others are not disturbed.
"""

import random
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from updraft_chassis.errors import NotFound, Unavailable
from updraft_chassis.retry import Backoff
from updraft_cli.local.child import Child, LogFile
from updraft_cli.local.process import Changed, Event, Listener, Process, State

_KILLED_WITHIN_S = 5.0
"""SIGKILL works at once, except on a process that waits for a dead disk: then we exit without it."""


class Supervisor:
    """Starts and stops `stages` of processes, as a context manager. Their logs are `logs`/<name>.log."""

    def __init__(
        self, stages: Sequence[Sequence[Process]], *, logs: Path, listener: Listener, seed: int | None = None
    ) -> None:
        rng = random.Random(seed)
        self._listener = listener
        self._changed = threading.Condition()
        self._is_stopping = False
        self._stages = [
            [
                Child(
                    process,
                    LogFile(logs / f"{process.name}.log"),
                    self._on_event,
                    Backoff(initial_s=1.0, cap_s=30.0, rng=rng),
                )
                for process in stage
            ]
            for stage in stages
        ]

    @property
    def children(self) -> list[Child]:
        return [child for stage in self._stages for child in stage]

    def child(self, name: str) -> Child:
        for child in self.children:
            if child.process.name == name:
                return child
        raise NotFound(f"there is no process {name}; there are {', '.join(c.process.name for c in self.children)}")

    def start(self) -> None:
        """Return when everything is ready; if something cannot start, stop everything and raise Unavailable."""
        try:
            for stage in self._stages:
                for child in stage:
                    child.start()
                self._wait_until_ready(stage)
        except BaseException:  # Ctrl-C too: nothing may be left running
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the stages, last first; a child that does not end in its time is killed. A `start` that waits gives up."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        for stage in reversed(self._stages):
            for child in stage:
                child.terminate()
            for child in stage:
                if not child.join(child.process.stop_within_s):
                    child.kill()
                    child.join(_KILLED_WITHIN_S)

    def kill(self) -> None:
        for child in self.children:
            child.kill()

    def crash(self, name: str, signum: signal.Signals = signal.SIGKILL) -> None:
        """Send `signum` to a child as a crash would, and return when it is ready again."""
        child = self.child(name)
        restarts = child.num_restarts
        child.crash(signum)
        with self._changed:
            is_back = self._changed.wait_for(
                lambda: child.num_restarts > restarts and child.state is State.READY, child.process.start_within_s
            )
        if not is_back:
            raise Unavailable(_failure(child))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_ready(self, stage: list[Child]) -> None:
        limit_s = max(child.process.start_within_s for child in stage)
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._is_stopping
                    or any(child.state is State.FAILED for child in stage)
                    or all(child.state is State.READY for child in stage)
                ),
                limit_s,
            )
        # Failed ones first: the others may just not have had time to start.
        for child in sorted(stage, key=lambda child: child.state is not State.FAILED):
            if child.state is not State.READY:
                raise Unavailable(_failure(child))

    def _on_event(self, event: Event) -> None:
        self._listener(event)
        if isinstance(event, Changed):
            with self._changed:
                self._changed.notify_all()


def _failure(child: Child) -> str:
    problem = child.reason if child.state is State.FAILED else f"was not ready in {child.process.start_within_s:g} s"
    lines = "".join(f"\n  {line}" for line in child.last_lines)
    return f"{child.process.name} {problem}; its last lines:{lines}\nThe whole log: {child.log_path}"
