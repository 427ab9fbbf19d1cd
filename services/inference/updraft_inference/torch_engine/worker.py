"""The engine's thread: it steps the scheduler and executes messages between two steps.

Torch keeps a pool of threads for each thread that computed with it. Once all pools together have more threads than there are
cores, idle ones no longer spin (libgomp's throttled spin count), and each operation waits until the kernel wakes one; a step
of eight streams then takes a third longer. So while this thread runs, it alone has a pool, and everything else in the process
computes with one thread.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch

from updraft_chassis.errors import Unavailable
from updraft_inference.engine import Delta
from updraft_inference.torch_engine.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

T = TypeVar("T")

Reader = asyncio.Queue[Delta | None]


def on_passing_thread(function: Callable[[], T]) -> T:
    """Run a function on a thread of its own, whose pool ends with it."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(function).result()


class DeltaQueue:
    """Deltas on their way from the engine's thread, which alone uses this, to event loops.

    An event loop that wakes takes the interpreter's lock and a core from the running step, so it is woken once per step, not
    once per request.
    """

    def __init__(self) -> None:
        self._held: defaultdict[asyncio.AbstractEventLoop, list[tuple[Reader, Delta]]] = defaultdict(list)

    def put(self, loop: asyncio.AbstractEventLoop, reader: Reader, delta: Delta) -> None:
        self._held[loop].append((reader, delta))

    def deliver(self) -> None:
        for loop, deltas in self._held.items():
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_put_all, deltas)
        self._held.clear()


def _put_all(deltas: list[tuple[Reader, Delta]]) -> None:
    for reader, delta in deltas:
        reader.put_nowait(delta)


class Worker:
    """Owns the scheduler while it runs. Start and stop it once; a scheduler that fails ends it. One per process at a time,
    because a second one would compute with one thread."""

    def __init__(self, scheduler: Scheduler, on_failure: Callable[[], None]) -> None:
        """`on_failure` is called on the thread, after which it ends."""
        self.delta_queue = DeltaQueue()
        self.failure: BaseException | None = None
        self._scheduler = scheduler
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pending: set[Future[float]] = set()
        self._num_threads = torch.get_num_threads()
        self._has_pool = threading.Event()
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_running(self) -> bool:
        """Messages will be executed."""
        return self.failure is None and self._thread.is_alive()

    async def start(self) -> None:
        """Begin to step, with as many threads as the creator had; every other thread has one until `stop`."""
        self._thread.start()
        await asyncio.to_thread(self._has_pool.wait)
        torch.set_num_threads(1)

    async def stop(self) -> None:
        """Cancel all requests and end the thread."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        torch.set_num_threads(self._num_threads)

    def send(self, message: Callable[[], None]) -> None:
        """Execute a message between two steps."""
        self._inbox.put(message)

    async def between_steps(self, effect: Callable[[], None]) -> float:
        """Run `effect` between two steps; returns its seconds. Raises its error, or Unavailable if the engine stops."""
        done: Future[float] = Future()

        def act() -> None:
            if not done.set_running_or_notify_cancel():
                return  # the caller is gone: change nothing
            started = time.perf_counter()
            try:
                effect()
            except Exception as error:  # noqa: BLE001 - the caller handles it, and the decode loop continues
                done.set_exception(error)
            else:
                done.set_result(time.perf_counter() - started)

        self._pending.add(done)
        done.add_done_callback(self._pending.discard)
        self._inbox.put(act)
        if self._has_ended or not self._thread.is_alive():
            self._refuse_pending()
        return await asyncio.wrap_future(done)

    # -- on the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        torch.get_num_threads()  # torch adopts the number when it is first read, and other threads will change it
        self._has_pool.set()
        try:
            while self._receive():
                self._scheduler.step()
            self._scheduler.cancel_all()
            self.delta_queue.deliver()
        except BaseException as error:
            self.failure = error
            logger.critical("The engine's thread failed", exc_info=error)
            self.delta_queue.deliver()
            self._on_failure()
            raise
        finally:
            self._has_ended = True  # set before waiting callers are refused: a later caller refuses itself
            self._refuse_pending()

    def _refuse_pending(self) -> None:
        for waiting in list(self._pending):
            with suppress(InvalidStateError):  # its caller is gone
                waiting.set_exception(Unavailable("the engine has stopped"))

    def _receive(self) -> bool:
        """Execute all messages, and wait for one while idle. Returns False to stop."""
        while True:
            self.delta_queue.deliver()
            try:
                message = self._inbox.get(block=self._scheduler.is_idle)
            except queue.Empty:
                return True
            if message is None:
                return False
            message()
