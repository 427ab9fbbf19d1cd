"""Work on items with several threads, a few of them in memory. For functions that release the interpreter's lock."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

_AHEAD = 2
"""Items that are taken before their turn, per worker."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def map_in_order(function: Callable[[S], T], items: Iterable[S], *, num_workers: int) -> Iterator[T]:
    """Yield `function(item)` of each item, in order. Items are taken on the caller's thread, shortly before their turn."""
    running: deque[Future[T]] = deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix=function.__name__) as pool:
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > _AHEAD * num_workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for left in running:
                left.cancel()
