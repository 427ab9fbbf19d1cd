"""Servers in processes of their own."""

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from tests.support.wait import LONG_S, wait_until


class ServerProcess:
    """A program that a subclass's `start` spawns; killed when the block ends."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        raise NotImplementedError

    def _spawn(self, command: Sequence[str | Path], **options: Any) -> None:
        self._process = subprocess.Popen(command, **options)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def send(self, signum: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(signum)

    def kill(self) -> None:
        """As the kernel's out-of-memory killer does."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """As Kubernetes does; return the exit status."""
        return self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Its kernel still accepts connections and bytes, but it answers nothing."""
        self.send(signal.SIGSTOP)

    def resume(self) -> None:
        self.send(signal.SIGCONT)

    def wait(self, timeout_s: float = LONG_S) -> int:
        """Return the exit status of a process that ends by itself."""
        assert self._process is not None
        return self._process.wait(timeout_s)

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


class Process(ServerProcess):
    """`python -m module` with `arguments` and `variables`, appending stderr to `log`."""

    def __init__(self, module: str, variables: Mapping[str, str], log: Path, arguments: Sequence[str] = ()) -> None:
        super().__init__()
        self._module = module
        self._arguments = arguments
        self.variables = variables
        self._log = log

    def start(self) -> None:
        # None of our variables from the test's own environment; one thread, because tests share two cores.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("UPDRAFT_")}
        environ = {**inherited, "OMP_NUM_THREADS": "1", **self.variables}
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", self._module, *self._arguments]
            self._spawn(command, env=environ, stdout=subprocess.DEVNULL, stderr=log)

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def wait_for_log(self, text: str, *, timeout_s: float = LONG_S) -> None:
        """Return once the log contains `text`; fail at once if the process ended without it."""

        def is_logged() -> bool:
            is_running = self.is_running  # checked first: its output before it ended counts
            if text in self.log():
                return True
            assert is_running, f"{self._module} ended without logging {text!r}:\n{self.log()[-3000:]}"
            return False

        wait_until(is_logged, timeout_s=timeout_s, what=f"{text!r} in the log of {self._module}")


@contextmanager
def process_group(
    command: Sequence[str], log: Path, *, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own, in the folder of its log. Its whole group is gone after the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=log.parent, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        for signum in (signal.SIGCONT, signal.SIGTERM):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            process.wait(LONG_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def scrape(port: int) -> dict[str, float]:
    """The metrics of a process by name with labels, as Prometheus shows them; empty while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LONG_S) as response:
            lines = response.read().decode().splitlines()
    except OSError:
        return {}
    values = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in values}


def total(metrics: Mapping[str, float], name: str) -> float:
    """The sum of a metric over its labels."""
    return sum(value for line, value in metrics.items() if line.partition("{")[0] == name)


def is_alive(pid: int) -> bool:
    """Whether a process still runs. A zombie does not; in a container it may never be reaped."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def reachable_ports(pid: int) -> set[int]:
    """TCP ports on which a process or one of its children listens for other machines."""
    process, ports = psutil.Process(pid), set[int]()
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            ports |= {
                each.laddr.port
                for each in one.net_connections(kind="tcp")
                if each.status == psutil.CONN_LISTEN and not ip_address(each.laddr.ip).is_loopback
            }
    return ports
