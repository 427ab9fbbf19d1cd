"""Threads that run calls in the order in which they come, and that never hold up the end of the program."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from updraft_chassis.errors import Unavailable

R = TypeVar("R")


class Worker:
    """Not a ThreadPoolExecutor: Python waits for its threads at the end, and a call of a backend may take minutes."""

    def __init__(self, name: str, num_threads: int = 1) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        """So that no call is queued behind the end, where nobody would run it."""
        self._is_closed = False
        self._num_threads = num_threads
        for _ in range(num_threads):
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, function: Callable[[], R]) -> Future[R]:
        """Queue a call; the future has its result. After `close` it fails with Unavailable."""
        future: Future[R] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if self._is_closed:
                future.set_exception(Unavailable("the console has ended"))
                return
            try:
                future.set_result(function())
            except StopIteration as error:  # no future can carry it
                future.set_exception(RuntimeError(f"the call ended early: {error!r}"))
            except BaseException as error:  # noqa: BLE001 - whoever waits for the call gets it
                future.set_exception(error)

        with self._lock:
            if not self._is_closed:
                self._calls.put(run)
                return future
        run()
        return future

    def close(self) -> None:
        """Run no further call; those that run go on, and nobody has to wait for them."""
        with self._lock:
            self._is_closed = True
            for _ in range(self._num_threads):
                self._calls.put(None)

    def _work(self) -> None:
        while (run := self._calls.get()) is not None:
            run()
