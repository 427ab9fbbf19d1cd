"""A process from start to exit.

The first SIGTERM or SIGINT sets the stop event: `main` drains and returns, and the exit code is 0. A second one kills
the process at once, except PID 1 of a container, which only SIGKILL can kill. An UpdraftError that `main` raises directly is
a failed start: it is printed as one sentence, exit code 1. An exception from a task of a TaskGroup is logged once, exit code
1: a failed task must end the process, because Kubernetes and `updraft up` restart processes, not tasks. While Python is
still importing modules, a signal ends the process immediately: see `while_importing`. A command that another program started
is killed by either signal, so that the other program sees it: see `let_signals_kill`.
"""

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from updraft_chassis.errors import UpdraftError

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_SWITCH_S = 0.0005
"""How long a thread keeps Python's lock while others want it. An event loop gives the lock up at each read and write of a
socket and waits so long for it again. `make bench-width ARGS='--rows path'` measures the waits; Python's own value is 5 ms."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Long work ends because a stop is requested."""


class Stop:
    """A stop request: `event` is set by the first SIGTERM or SIGINT, or by `request`."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    @property
    def requested(self) -> bool:
        return self.event.is_set()

    def request(self) -> None:
        """Stop from inside the process, as a signal does from outside."""
        self.event.set()

    def check(self) -> None:
        """Raise Stopped after a stop request: for long work in threads, which call this between its parts."""
        if self.requested:
            raise Stopped

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Sleep for up to `timeout_s`; true as soon as a stop is requested, false after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.event.wait()
        except TimeoutError:
            return False
        return True


def while_importing() -> None:
    """Until `run`, let the first SIGTERM or SIGINT end the process at once with exit code 0.

    Call it in `main`, before any import that takes long. Otherwise the signal would kill Python or print a traceback, and
    PID 1 of a container would not end at all, because the kernel does not deliver signals that PID 1 has no handler for.
    """
    for signum in _SIGNALS:
        # os._exit rather than SystemExit, which imported code may catch.
        signal.signal(signum, lambda *_: os._exit(0))


def let_signals_kill() -> None:
    """From now on, let SIGTERM and SIGINT kill the process: for work that a kill cannot damage.

    The exit code then tells the parent that the work was not done.
    """
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_DFL)


def run(process: str, main: Callable[[Stop], Awaitable[None]]) -> None:
    """Run `main(stop)` in a new event loop; return when it returned, raise SystemExit(1) when it raised.

    Imported modules stay until the end, so garbage collection skips them from here on: with torch, a scan takes a tenth of a
    second, during which the event loop stands still.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_S)
    with errors_as_sentences(process):
        asyncio.run(_supervise(process, main))


@contextmanager
def errors_as_sentences(process: str) -> Iterator[None]:
    """Raise SystemExit(1) for an exception: an UpdraftError is printed, any other exception is logged."""
    try:
        yield
    except UpdraftError as error:
        print(f"{process}: {error}", file=sys.stderr)  # noqa: T201 - for the person at the terminal, not for logs
        raise SystemExit(1) from None
    except Exception as error:  # the last handler: every exception is logged once
        for leaf in _leaves(error):
            bug = None if isinstance(leaf, UpdraftError) else leaf  # only bugs need a traceback
            logger.critical("%s failed: %s", process, str(leaf) or type(leaf).__name__, exc_info=bug)
        raise SystemExit(1) from None


async def _supervise(process: str, main: Callable[[Stop], Awaitable[None]]) -> None:
    stop = Stop()
    for signum in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(signum, _on_signal, process, stop, signum)
    await main(stop)


def _on_signal(process: str, stop: Stop, signum: signal.Signals) -> None:
    for handled in _SIGNALS:
        # Restore the default action, which also ends a process whose event loop is stuck.
        asyncio.get_running_loop().remove_signal_handler(handled)
        signal.signal(handled, signal.SIG_DFL)
    logger.info("%s is stopping", process, extra={"signal": signum.name})
    stop.request()


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for child in error.exceptions:
            yield from _leaves(child)
    else:
        yield error
