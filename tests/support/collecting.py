"""Changes during a garbage collection, in which Python may run another thread."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def changing_at_collections(change: Callable[[], object]) -> Iterator[None]:
    """Call `change` whenever a collection starts, and collect often."""

    def collecting(phase: str, _info: object) -> None:
        if phase == "start":
            change()

    before = gc.get_threshold()
    gc.callbacks.append(collecting)
    gc.set_threshold(100)
    try:
        yield
    finally:
        gc.callbacks.remove(collecting)
        gc.set_threshold(*before)
