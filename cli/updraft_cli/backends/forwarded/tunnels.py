"""Ways to the registries of a cluster: `kubectl port-forward` to the pod, and a token for its ServiceAccount.

Both need rights that not everybody has: `create` on `pods/portforward` and on `serviceaccounts/token`, which are part of
Kubernetes' role edit. Whoever lacks them sees what the API server holds, and why there is no more.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import Forbidden, Unavailable, UpdraftError
from updraft_cli.backends.cluster_client import KubeContext, connected
from updraft_cli.backends.installation import Installation
from updraft_cli.backends.registry import RegistryBackend
from updraft_cli.local import tether

_PORT = 50051
_TOKEN_S = 3600
_RENEW = 0.7
"""After this part of a token's life, another one is asked for."""
_RETRY_S, _REFUSED_S = 10.0, 300.0
"""After what failed; after what this person may not do, because each attempt is in the API server's audit log."""
_ANSWER_S = 5.0
"""For all that a page needs."""
_STOP_S = 5.0

_FORWARDED = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+) ")


class Tunnel:
    """The way to one registry. It opens in the background, and again after it broke. For one thread, but for `close`."""

    def __init__(self, context: KubeContext, namespace: str, speculator: str, token_file: Path) -> None:
        self.problem = ""
        """Why there is no way now; empty: there is one, or it is being opened for the first time."""
        self._context = context
        self._namespace = namespace
        self._speculator = speculator
        self._token_file = token_file
        self._ca_file = token_file.with_suffix(".ca")
        self._has_tls = False
        self._renew_s = 0.0
        """Unix time, because other clocks stand still while a laptop sleeps."""
        self._retry_s = float("-inf")
        self._lock = threading.Lock()
        """For what outlives a closed tunnel if it is made too late: a process, and files with a token."""
        self._is_closed = False
        self._process: subprocess.Popen[str] | None = None
        self._port = 0
        """0: not open yet."""
        self._error = ""

    def registry(self) -> RegistryBackend | None:
        """Return the registry if it can be asked now."""
        try:
            is_open = self._open()
        except (UpdraftError, OSError) as error:
            self.failed(error)
            return None
        if not is_open:
            return None
        self.problem = ""
        return RegistryBackend(
            address=f"127.0.0.1:{self._port}",
            speculator=self._speculator,
            is_one=True,
            within_s=_ANSWER_S,
            credentials=Credentials(
                token_file=self._token_file,
                ca_file=self._ca_file if self._has_tls else None,
                server_name=f"{self._speculator}-registry.{self._namespace}.svc" if self._has_tls else "",
            ),
            local=lambda: Installation(speculators=()),
        )

    def failed(self, error: Exception) -> None:
        """Try again later, after a call of the registry too: the way may be dead, or the token or the CA be old."""
        with self._lock:
            self._stop()
        self.problem, self._renew_s = str(error), 0.0
        is_refused = isinstance(error, Forbidden) or "forbidden" in self.problem.lower()
        self._retry_s = time.monotonic() + (_REFUSED_S if is_refused else _RETRY_S)

    def end(self) -> None:
        """Begin to close it for good."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.terminate()

    def close(self, within_s: float = _STOP_S) -> None:
        """Close it for good."""
        with self._lock:
            self._is_closed = True
            self._stop(within_s)

    def _stop(self, within_s: float = _STOP_S) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(within_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process, self._port = None, 0

    def _open(self) -> bool:
        """Raise Unavailable if kubectl has ended."""
        if time.monotonic() < self._retry_s:
            return False
        if self._process is not None and self._process.poll() is not None:
            raise Unavailable(self._error or "kubectl port-forward has ended")
        if time.time() >= self._renew_s:
            self._renew()
        if self._process is None:
            self._forward()
        return self._port != 0

    def _renew(self) -> None:
        now_s = time.time()
        with connected(replace(self._context, namespace=self._namespace)) as client:
            token, expires = client.registry_token(self._speculator, _TOKEN_S)
            authorities = client.registry_ca(self._speculator)
        with self._opening():
            _write(self._token_file, token)
            _write(self._ca_file, authorities)
        self._has_tls = bool(authorities)
        self._renew_s = now_s + _RENEW * (expires.timestamp() - now_s)

    def _forward(self) -> None:
        if (kubectl := shutil.which("kubectl")) is None:
            raise FileNotFoundError("kubectl is not on the PATH")
        context = self._context
        options = [f"--kubeconfig={context.kubeconfig}"] if context.kubeconfig else []
        options += [f"--context={context.context}"] if context.context else []
        pod = f"pod/{self._speculator}-registry-0"
        command = [
            *_tied(),
            kubectl,
            *options,
            "-n",
            self._namespace,
            "port-forward",
            "--address=127.0.0.1",
            pod,
            f":{_PORT}",
        ]
        with self._opening():
            process = self._process = subprocess.Popen(  # noqa: S603 - the person's own kubectl
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C ends the console, which ends this
                text=True,
            )
        assert process.stdout is not None
        assert process.stderr is not None
        self._port, self._error = 0, ""
        for follow, stream in ((self._note_port, process.stdout), (self._note_error, process.stderr)):
            threading.Thread(target=_followed, args=(stream, follow), name="port-forward", daemon=True).start()

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Raise Unavailable once it is closed for good."""
        with self._lock:
            if self._is_closed:
                raise Unavailable("the console has ended")
            yield

    def _note_port(self, line: str) -> None:
        if (found := _FORWARDED.match(line)) is not None:
            self._port = int(found[1])

    def _note_error(self, line: str) -> None:
        self._error = " ".join(line.split())


def _tied() -> list[str]:
    """Return the start of a command that ends with this process, however that ends; Linux can do that."""
    return [sys.executable, "-I", "-S", tether.__file__, str(os.getpid())] if sys.platform == "linux" else []


def _write(file: Path, content: str) -> None:
    """Write it at once, and readable by this user only."""
    new = file.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(content)
    new.replace(file)


def _followed(stream: IO[str], note: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            note(line)


@dataclass(slots=True, kw_only=True)
class Tunnels:
    """One for each speculator that was asked for."""

    context: KubeContext
    folder: Path
    """For tokens; only this user can read it."""
    _open: dict[str, Tunnel] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_closed: bool = False

    def to(self, namespace: str, speculator: str) -> Tunnel:
        with self._lock:
            if speculator not in self._open:
                tunnel = Tunnel(self.context, namespace, speculator, self.folder / speculator)
                if self._is_closed:
                    tunnel.close()
                self._open[speculator] = tunnel
            return self._open[speculator]

    def close(self) -> None:
        """From any thread. All of them end at the same time."""
        with self._lock:
            self._is_closed = True
            opened = tuple(self._open.values())
        for tunnel in opened:
            tunnel.end()
        until_s = time.monotonic() + _STOP_S
        for tunnel in opened:
            tunnel.close(max(0.0, until_s - time.monotonic()))


@contextmanager
def tunnels(context: KubeContext) -> Iterator[Tunnels]:
    """Close all of them at the end of the block, and delete their tokens."""
    with tempfile.TemporaryDirectory(prefix="updraft-ui-") as folder:
        opened = Tunnels(context=context, folder=Path(folder))
        try:
            yield opened
        finally:
            opened.close()
