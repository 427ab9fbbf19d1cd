"""A process from start to exit: signals ask it to stop, errors end it, and either is said once.

SIGTERM or SIGINT sets the stop event: `main` drains and returns, exit 0. A second one kills at once, except the first
process of a container, which only SIGKILL can kill. An UpdraftError that leaves `main` bare is a failed start: one
sentence, exit 1. What a TaskGroup's child raises is logged once, and exit 1: a dead child must end the process, for
what is above (Kubernetes, `updraft up`) restarts processes, not tasks. Before all that, while Python imports for
seconds, a signal just ends the process: see `while_importing`.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator

from updraft_chassis.errors import UpdraftError

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """The wish to stop: `event` is set by the first SIGTERM or SIGINT, or by `request`."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    @property
    def requested(self) -> bool:
        """Whether the process should come to an end."""
        return self.event.is_set()

    def request(self) -> None:
        """Ask for the end from inside, as a signal does from outside."""
        self.event.set()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Return true once stopping is requested, or false after `timeout_s`: a sleep that can end early."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.event.wait()
        except TimeoutError:
            return False
        return True


def while_importing() -> None:
    """Until `run`, let the first SIGTERM or SIGINT end the process at once with exit 0: it has begun nothing yet.

    For the first line of a `main`. Without it Python would be killed by the signal, or tell of it in a traceback; and
    the first process of a container would not even end, for the kernel keeps from it what it does not handle.
    """
    for signum in _SIGNALS:
        # Not SystemExit: imported code may catch that.
        signal.signal(signum, lambda *_: os._exit(0))


def run(process: str, main: Callable[[Stop], Awaitable[None]]) -> None:
    """Run `main(stop)` in a new event loop; return when it returned, raise SystemExit(1) when it raised."""
    try:
        asyncio.run(_supervise(process, main))
    except UpdraftError as error:
        print(f"{process}: {error}", file=sys.stderr)  # noqa: T201 - for the person who starts it, not for logs
        raise SystemExit(1) from None
    except Exception as error:  # the supervisor: whatever it is, it is logged once
        for leaf in _leaves(error):
            bug = None if isinstance(leaf, UpdraftError) else leaf  # only a bug's traceback is worth reading
            logger.critical("%s failed: %s", process, str(leaf) or type(leaf).__name__, exc_info=bug)
        raise SystemExit(1) from None


async def _supervise(process: str, main: Callable[[Stop], Awaitable[None]]) -> None:
    stop = Stop()
    for signum in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(signum, _on_signal, process, stop, signum)
    await main(stop)


def _on_signal(process: str, stop: Stop, signum: signal.Signals) -> None:
    for each in _SIGNALS:
        # The kernel's own action from here on: it also ends a process whose event loop is stuck.
        asyncio.get_running_loop().remove_signal_handler(each)
        signal.signal(each, signal.SIG_DFL)
    logger.info("%s stops", process, extra={"signal": signum.name})
    stop.request()


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for child in error.exceptions:
            yield from _leaves(child)
    else:
        yield error
