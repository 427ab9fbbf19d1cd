"""A deployable as its own process, with the environment of the test's choice and its log in a file."""

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from tests.support.wait import LONG_S, wait_until


class Process:
    """`python -m module` with `variables`, appending stderr to `log`; killed when the block ends."""

    def __init__(self, module: str, variables: Mapping[str, str], log: Path) -> None:
        self._module = module
        self.variables = variables
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # Nothing of ours from the test's own environment; one thread, for tests share two cores.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("UPDRAFT_")}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                env={**inherited, "OMP_NUM_THREADS": "1", **self.variables},
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def kill(self) -> None:
        """As the kernel's out-of-memory killer does."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """It stops where it is; its kernel still takes bytes for it."""
        self.send(signal.SIGSTOP)

    def send(self, signum: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(signum)

    def terminate(self) -> int:
        """As Kubernetes does; return the exit status."""
        return self._end(signal.SIGTERM)

    def wait(self, timeout_s: float = LONG_S) -> int:
        """Return the exit status of a process that ends by itself."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def wait_for_log(self, text: str, *, timeout_s: float = LONG_S) -> None:
        """Return once the log holds `text`; fail at once if the process ended without it."""

        def told() -> bool:
            running = self.is_running  # asked first: what it wrote before it ended counts
            if text in self.log():
                return True
            assert running, f"{self._module} ended without saying {text!r}:\n{self.log()[-3000:]}"
            return False

        wait_until(told, timeout_s=timeout_s, what=f"{text!r} in the log of {self._module}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _end(self, how: signal.Signals) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(how)
        try:
            return self._process.wait(LONG_S)
        finally:
            self._process.kill()


def scrape(port: int) -> dict[str, float]:
    """The metrics of a process by name with labels, as Prometheus shows them; empty while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LONG_S) as response:
            lines = response.read().decode().splitlines()
    except OSError:
        return {}
    values = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in values}


def is_alive(pid: int) -> bool:
    """Whether a process still runs; one that nobody has waited for yet (in a container perhaps nobody will) does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
