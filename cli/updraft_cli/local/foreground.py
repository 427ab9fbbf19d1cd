"""A stack in the foreground until a signal: the first signal stops it in order, the second at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from updraft_cli.local.plan import StackConfig
from updraft_cli.local.running import noted
from updraft_cli.local.stack import Stack
from updraft_cli.local.terminal import Terminal

# SIGHUP: the terminal was closed. Under nohup it is ignored, and we leave it so.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(config: StackConfig, terminal: Terminal) -> None:
    """Run the stack until SIGINT, SIGTERM or SIGHUP; returns when everything has ended."""
    stack = Stack(config, listener=terminal.listen)
    try:
        with _interrupted_by_signals(terminal, stack.kill), stack, noted(config.data, os.environ):
            terminal.welcome(stack)
            threading.Event().wait()
    except KeyboardInterrupt:
        terminal.print("Everything has stopped. The data is kept.")


@contextmanager
def _interrupted_by_signals(terminal: Terminal, kill: Callable[[], None]) -> Iterator[None]:
    """Raise KeyboardInterrupt in the block at the first signal; call `kill` at every further one."""
    num_signals = 0

    def on_signal(_signum: int, _frame: FrameType | None) -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals == 1:
            terminal.print("Stopping: requests finish, and the trainer saves. Ctrl-C again stops at once.")
            raise KeyboardInterrupt
        # In a thread: this handler may have interrupted code that holds a lock which killing needs.
        threading.Thread(target=kill, name="kill").start()

    replaced = {
        signum: signal.signal(signum, on_signal)
        for signum in _SIGNALS
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handler in replaced.items():
            signal.signal(signum, handler)
