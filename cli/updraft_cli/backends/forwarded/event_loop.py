"""One event loop for all threads that call registries: gRPC loses events of loops that come and go beside each other."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from updraft_chassis.errors import Unavailable

R = TypeVar("R")


class EventLoop:
    """It runs on a thread of its own, which never holds up the end of the program."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._lock = threading.Lock()
        self._is_closed = False
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Return the result of a coroutine, as `asyncio.run` does; Unavailable once the loop is closed."""
        with self._lock:
            if self._is_closed:
                coroutine.close()
                raise Unavailable("the console has ended")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise Unavailable("the console has ended") from None

    def close(self) -> None:
        """Cancel everything that runs; may be called again."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._loop.call_soon_threadsafe(self._end.set)

    def _work(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._end.wait())
