"""The data folder of `updraft up`: one owner at a time, and a note of what runs for `updraft status`.

lock                 held by the supervisor; the kernel frees it, so a kill leaves nothing to clean up
state.json           processes and addresses, while the supervisor runs
logs/<process>.log   output of the processes
redis/ registry/ trainer/ inference/    data of each part; a restart continues from it
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from updraft_chassis.errors import Conflict, Exhausted, InvalidInput
from updraft_cli.local.process import ProcessState

_MAX_SOCKET_PATH_BYTES = 107  # sockaddr_un, less the final zero


class StackState(BaseModel):
    model_config = ConfigDict(frozen=True)

    pid: int
    created_unix_s: float
    """Start time of that pid, because pids are reused."""
    updraft_version: str
    model: str
    speculator: str
    inference_url: str
    registry_address: str
    redis_url: str
    metrics_urls: dict[str, str]
    processes: tuple[ProcessState, ...]


class DataFolder:
    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.logs = self.path / "logs"
        self._state = self.path / "state.json"

    def of(self, part: str) -> Path:
        """Return the folder of one process, created if needed."""
        folder = self.path / part
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def redis_socket(self) -> Path:
        """Redis's unix socket: unlike a port it is never taken, and other users cannot reach it."""
        path = self.path / "redis.sock"
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
            raise InvalidInput(
                f"{self.path} is too long for the path of a socket (with /redis.sock at most"
                f" {_MAX_SOCKET_PATH_BYTES} characters); choose a shorter one with --data"
            )
        return path

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Create the folder and own it; Conflict names the process that owns it already."""
        try:
            # It holds prompts of users, so only this user may read it.
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise Exhausted(f"cannot use {self.path}: {error.strerror}; choose another folder with --data") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise Conflict(
                    f"another updraft (pid {lock.read().strip()}) runs on {self.path};"
                    " stop it, or choose another folder with --data"
                ) from None
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            try:
                yield
            finally:
                self._state.unlink(missing_ok=True)

    def write_state(self, state: StackState) -> None:
        """Replace `state.json`; readers see the old or the new content."""
        partial = self._state.with_suffix(".partial")
        partial.touch(mode=0o600)  # a Redis address may hold a password
        partial.write_text(state.model_dump_json(indent=2) + "\n")
        partial.replace(self._state)

    def read_state(self) -> StackState | None:
        """Return the stack that runs here, or None."""
        try:
            state = StackState.model_validate_json(self._state.read_text())
        except (OSError, ValidationError):  # one of another version does not run any more either
            return None
        return state if _is_alive(state.pid, state.created_unix_s) else None


def _is_alive(pid: int, created_unix_s: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - created_unix_s) < 1.0
    except psutil.NoSuchProcess:
        return False
