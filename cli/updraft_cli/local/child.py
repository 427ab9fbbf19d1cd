"""One process kept alive: started, watched until it is ready, and restarted when it ends by itself.

A thread per child starts it and waits for it: the kernel ties a child to the thread that started it (tether.py). A child
that ends before it was ever ready has failed and is not restarted, because a taken port or a wrong setting does not change.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import IO

from updraft_chassis.retry import Backoff
from updraft_cli.local.process import Changed, Line, Listener, Process, State

_POLL_S = 0.1

_STEADY_S = 60.0
"""A child that ran this long does not inherit the delay of earlier crashes."""

_NUM_LAST_LINES = 20
"""Enough for the last words of inference about a server of its own: a sentence and 15 lines of the server."""

_MAX_LINE_BYTES = 64 * 1024
"""Longer lines are split: a child that writes no newlines must not fill our memory."""

_TETHER = Path(__file__).with_name("tether.py")


class LogFile:
    """Appends output lines to `path`; a file that would pass `max_bytes` becomes `<name>.1` first.

    A full disk loses lines, and the log later records how many; it must never stop the child that wrote them.
    """

    def __init__(self, path: Path, *, max_bytes: int = 10_000_000) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._num_lost = 0
        self._file: IO[bytes] | None = None

    def write(self, line: bytes) -> None:
        """Append one line, or count it as lost if the disk is full."""
        try:
            file = self._opened(len(line))
            if self._num_lost:
                file.write(f"({self._num_lost} lines are missing here: the disk was full)\n".encode())
                self._num_lost = 0
            file.write(line)
        except OSError:
            self._num_lost += 1

    def close(self) -> None:
        """Close the file until something is written again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self, num_bytes: int) -> IO[bytes]:
        if self._file is not None and self._file.tell() + num_bytes > self._max_bytes:
            self.close()
            self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        if self._file is None:
            self._file = self.path.open("ab", buffering=0)  # unbuffered: a person follows it with tail -f
        return self._file


class Child:
    """Runs `process` until `terminate` or `kill`; `listener` gets its lines and its changes of state."""

    def __init__(self, process: Process, log: LogFile, listener: Listener, backoff: Backoff) -> None:
        self.process = process
        self.state = State.STOPPED
        self.reason = ""
        self.num_restarts = 0
        self.last_lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)
        self._log = log
        self._listener = listener
        self._backoff = backoff
        self._was_ready = False
        self._stopping = threading.Event()
        self._guard = threading.Lock()  # checking for a stop and starting are one step
        self._running: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep_alive, name=f"child-{process.name}", daemon=True)

    @property
    def pid(self) -> int | None:
        """The process id, or None between two runs."""
        running = self._running
        return None if running is None else running.pid

    @property
    def log_path(self) -> Path:
        return self._log.path

    def start(self) -> None:
        self._thread.start()

    def terminate(self) -> None:
        """End it for good (SIGTERM)."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def crash(self, signum: signal.Signals = signal.SIGKILL) -> None:
        """Send `signum` as a crash would: if it ends, it is restarted."""
        if self._running is not None:
            self._running.send_signal(signum)

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for a child that was told to end; false if it is still running."""
        if self._thread.ident is not None:  # else it was never started
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _end(self, signum: signal.Signals) -> None:
        with self._guard:
            self._stopping.set()
            running = self._running
        if running is not None:
            self._change(State.STOPPING)
            running.send_signal(signum)

    def _keep_alive(self) -> None:
        while (running := self._make()) is not None:
            lived_s = self._watch(running)
            if self._stopping.is_set():
                break
            self.reason = ending(running.returncode)
            if not self._was_ready:
                self._log.close()
                self._change(State.FAILED)
                return
            self._pause(lived_s)
            self.num_restarts += 1
        self._log.close()
        self._change(State.STOPPED)

    def _make(self) -> subprocess.Popen[bytes] | None:
        """Start the process; None if it should end."""
        with self._guard:
            if self._stopping.is_set():
                return None
            self._running = subprocess.Popen(  # noqa: S603 - the command is the plan's own
                [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()), *self.process.command],
                env={**os.environ, **self.process.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C goes to the supervisor alone
            )
        self._change(State.STARTING)
        return self._running

    def _watch(self, running: subprocess.Popen[bytes]) -> float:
        """Follow one run to its end; return its length in seconds."""
        reader = threading.Thread(target=self._read, args=(running.stdout,), daemon=True)
        reader.start()
        start_s = time.monotonic()
        while running.poll() is None:
            if not self._stopping.is_set() and self.process.is_ready():
                self._was_ready = True
                self._change(State.READY, after_s=time.monotonic() - start_s)
                running.wait()
            with suppress(subprocess.TimeoutExpired):
                running.wait(timeout=_POLL_S)
        # A grandchild that holds the pipe open must not keep us waiting: its later output is dropped.
        reader.join(timeout=1.0)
        self._running = None
        return time.monotonic() - start_s

    def _read(self, output: IO[bytes]) -> None:
        with output:
            while line := output.readline(_MAX_LINE_BYTES):
                self._log.write(line)
                text = line.decode(errors="replace").rstrip()
                self.last_lines.append(text)
                self._listener(Line(process=self.process, text=text))

    def _pause(self, lived_s: float) -> None:
        if lived_s > _STEADY_S:
            self._backoff.reset()
        delay_s = next(self._backoff)
        self._change(State.RESTARTING, after_s=delay_s)
        self._stopping.wait(delay_s)

    def _change(self, state: State, *, after_s: float = 0.0) -> None:
        self.state = state
        event = Changed(process=self.process, state=state, pid=self.pid, after_s=after_s, reason=self.reason)
        self._listener(event)


def ending(returncode: int) -> str:
    """How a process ended, from the exit code that `subprocess` gives it."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-returncode}"
