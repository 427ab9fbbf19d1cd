"""A stock SGLang server, on this CPU unless told otherwise, as a process group of its own with its log in a file.

What only a CPU needs is here; what Updraft needs of a server comes from the caller. One thread, for tests share two cores.
"""

import contextlib
import os
import signal
import ssl
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
from tests.sglang import build
from tests.support.ports import free_port
from tests.support.processes import is_alive
from tests.support.wait import LONG_S, wait_until

START_S = 600.0
"""It is up in 20 to 50 s. Its imports take many times that where others use the cores, and the first ones compile."""

CPU_VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "300",  # else it restarts HTTP processes that a busy machine slows down
}
"""What SGLang reads from the environment where there is no GPU."""

CPU_ARGUMENTS = (
    *("--device", "cpu", "--attention-backend", "intel_amx", "--disable-cuda-graph", "--dtype", "float32"),
    *("--log-level-http", "warning"),
    *("--mem-fraction-static", "0.2", "--max-total-tokens", "8192", "--max-running-requests", "16"),
)
"""What a server is started with there, small enough for a test; exactness is claimed in float32 only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a server runs on: an interpreter that has SGLang for it, and what SGLang needs to be told there."""

    python: Callable[[], Path]
    arguments: Sequence[str]
    variables: Mapping[str, str]


CPU = Device(python=build.python, arguments=CPU_ARGUMENTS, variables=CPU_VARIABLES)

_TOLD_LINES = 40


class ServerDiedError(Exception):
    """The server ended before it served; the message holds the end of its log."""


def eagle3(draft: Path, *, num_steps: int = 3) -> list[str]:
    """The arguments of speculation with chains of `num_steps` drafts."""
    return [
        *("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(draft)),
        *("--speculative-num-steps", str(num_steps), "--speculative-eagle-topk", "1"),
        *("--speculative-num-draft-tokens", str(num_steps + 1)),
    ]


class Server:
    """`sglang.launch_server` on `target`; killed with all its processes when the block ends.

    `arguments` come after those that the device needs, and so win over them; `plugins` are folders for PYTHONPATH. Every step
    drafts, unless `variables` say otherwise. `trusting` is for a server whose arguments have a certificate.
    """

    def __init__(
        self,
        target: Path,
        log: Path,
        *,
        arguments: Sequence[str] = (),
        plugins: Sequence[Path] = (),
        variables: Mapping[str, str] | None = None,
        device: Device = CPU,
        trusting: ssl.SSLContext | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"{'http' if trusting is None else 'https'}://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=LONG_S, verify=trusting or True)
        self._command = [
            *(str(device.python()), "-m", "sglang.launch_server", "--model-path", str(target)),
            *("--host", "127.0.0.1", "--port", str(self.port), *device.arguments, *arguments),
        ]
        self._variables = {
            **device.variables,
            "UPDRAFT_SGLANG_DRAFTING": "always",
            "PYTHONPATH": os.pathsep.join(str(folder) for folder in plugins),
            **(variables or {}),
        }
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; `wait_until_ready` waits."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("UPDRAFT_", "SGLANG_"))}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**inherited, **self._variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_ready(self, timeout_s: float = START_S) -> None:
        """Return once it takes requests. ServerDiedError as soon as it has ended."""

        def is_ready() -> bool:
            if not self.is_running:
                raise ServerDiedError(f"SGLang ended before it served:\n{self.log_tail()}")
            with contextlib.suppress(httpx.TransportError):
                return self.http.get("/ready").is_success
            return False

        try:
            wait_until(is_ready, timeout_s=timeout_s, what="SGLang's readiness")
        except TimeoutError as error:
            raise TimeoutError(f"{error}:\n{self.log_tail()}") from None

    def post(self, path: str, **body: Any) -> Any:
        """The answer, from JSON where it is that; what is no success raises."""
        response = self.http.post(path, json=body)
        assert response.is_success, f"{path} answered {response.status_code}: {response.text[:2000]}"
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.json() if is_json else response.text

    def terminate(self, timeout_s: float = LONG_S) -> int:
        """SIGTERM to the main process alone, which drains; return the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """End all its processes at once, and wait until none is left."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(LONG_S)
        group, self._process = self._process.pid, None
        wait_until(lambda: not _members(group), what="the end of SGLang's processes")

    def scheduler(self) -> psutil.Process:
        """The process that runs the models."""
        for process in psutil.Process(self.pid).children(recursive=True):
            if "scheduler" in " ".join(process.cmdline()):
                return process
        raise AssertionError("SGLang has no scheduler process")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-_TOLD_LINES:])

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.http.close()


def _members(group: int) -> list[int]:
    """The living processes of a process group."""
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == group and is_alive(pid):
                members.append(pid)
    return members
