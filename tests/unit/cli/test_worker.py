"""Calls on other threads end, also those that come while the console ends."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest
from tests.support.wait import LONG_S

from updraft_chassis.errors import Unavailable
from updraft_cli.worker import Worker


class SlowQueue(SimpleQueue[Callable[[], None] | None]):
    """A call reaches it only when another thread has closed the worker, or waits to."""

    def __init__(self, close: Callable[[], None]) -> None:
        self.closing = threading.Thread(target=close)

    def put(self, item: Callable[[], None] | None, block: bool = True, timeout: float | None = None) -> None:  # noqa: FBT001, FBT002 - as in the standard library
        if item is not None:
            self.closing.start()
            self.closing.join(0.2)
        super().put(item, block, timeout)


def test_a_call_that_comes_while_the_worker_is_closed_ends() -> None:
    worker = Worker("test", 0)
    worker._num_threads = 1
    worker._calls = calls = SlowQueue(worker.close)
    late = worker.submit(lambda: "done")
    calls.closing.join(LONG_S)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(worker._work).result(LONG_S)
    with pytest.raises(Unavailable, match="the console has ended"):
        late.result(0)


def test_a_call_after_the_end_fails() -> None:
    worker = Worker("test")
    worker.close()
    with pytest.raises(Unavailable, match="the console has ended"):
        worker.submit(lambda: "done").result(0)
