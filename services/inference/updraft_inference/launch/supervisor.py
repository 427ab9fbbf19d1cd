"""Runs a stock server as a child process: starts it, waits until it is up, forwards its log, and stops it gracefully.

SIGTERM goes only to its main process, which lets requests finish and stops the others; a SIGTERM to those would kill them.
After a deadline the whole process group is killed. If this process dies, the kernel sends the child a SIGTERM.
"""

import asyncio
import logging
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_inference.tap.server_kind import ServerKind

logger = logging.getLogger(__name__)

_LOG_S = 15.0
_END_S = 10.0
"""Time for a server without requests to stop."""
_POLL_S = 0.5
_LAST_WORDS_S = 2.0
"""Time to read the last lines of a server that ended: its children may hold its output open."""
_MAX_LINE = 1 << 20
_NUM_LAST_LINES = 15

_LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has gone")
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
"""
"""The server's interpreter runs this. It requests a SIGTERM when the parent dies (PR_SET_PDEATHSIG), and becomes the server."""

_SERIOUS = re.compile(r"\bERROR\b|\bCRITICAL\b|Traceback|Error:|Exception:")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCommand:
    """The command to run. `environment` is complete."""

    kind: ServerKind
    python: Path
    arguments: Sequence[str]
    environment: Mapping[str, str]
    drain_s: float
    """How long running requests may take to finish."""


def environment(kind: ServerKind, inherited: Mapping[str, str], *, plugin: Path, socket: Path) -> dict[str, str]:
    """The server's environment: ours without our settings, which contain secrets, plus the plugin's."""
    passed = {name: value for name, value in inherited.items() if not name.startswith("UPDRAFT_INFERENCE_")}
    paths = [str(plugin), *filter(None, [passed.get("PYTHONPATH")])]
    allowed = passed.get(kind.plugins_variable)
    return passed | {
        "PYTHONPATH": os.pathsep.join(paths),
        kind.socket_variable: str(socket),
        **({} if not allowed else {kind.plugins_variable: f"{allowed},updraft"}),
    }


class Supervisor:
    def __init__(self, launch: ServerCommand, tasks: asyncio.TaskGroup) -> None:
        self._launch = launch
        self._tasks = tasks
        self._process: asyncio.subprocess.Process | None = None
        self._last_lines: list[str] = []
        self._reading: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._is_stopped = False
        """Set by the stop after which no restart may start the server."""

    @property
    def has_ended(self) -> bool:
        is_restarting = self._changing.locked()
        return not is_restarting and (self._process is None or self._process.returncode is not None)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start it and forward its log. Raises InvalidInput if the interpreter cannot be started."""
        launch = self._launch
        try:
            self._process = await asyncio.create_subprocess_exec(
                str(launch.python),
                "-c",
                _LAUNCH,
                str(os.getpid()),
                launch.kind.module,
                *launch.arguments,
                env=dict(launch.environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=_MAX_LINE,
                start_new_session=True,
            )
        except OSError as error:
            raise InvalidInput(
                f"cannot start {launch.python} ({error.strerror}); {launch.kind.setting('PYTHON')} must be the Python"
                f" interpreter of an environment with {launch.kind.engine}"
            ) from error
        self._reading = self._tasks.create_task(self._pass_on(self._process.stdout))

    async def failure(self) -> Unavailable:
        """The error for a server that ended, with its last lines."""
        if self._reading is not None:
            await asyncio.wait((self._reading,), timeout=_LAST_WORDS_S)
        status = None if self._process is None else self._process.returncode
        last = "\n".join(self._last_lines)
        return Unavailable(f"the {self._launch.kind.engine} server ended with status {status}; its last lines:\n{last}")

    async def ready(self, is_up: Callable[[], Awaitable[bool]], is_stopped: Callable[[], bool]) -> None:
        """Wait until it serves. Raises Unavailable, with its last log lines, if it ends first, or if this process is
        stopping."""
        kind = self._launch.kind
        await until_up(kind.engine, is_up, is_stopped=is_stopped, has_ended=lambda: self.has_ended)
        if self.has_ended:
            raise await self.failure()

    async def stop(self) -> None:
        """Let it drain, then kill the rest of its process group. It does not start again."""
        self._is_stopped = True
        async with self._changing:
            await self._end()

    async def restart(self, arguments: Sequence[str]) -> None:
        """Stop it as `stop` does, and start it with other arguments. Raises Unavailable if it is stopped meanwhile."""
        async with self._changing:
            await self._end()
            if self._is_stopped:
                raise Unavailable(f"the {self._launch.kind.engine} server is stopped, so it does not start again")
            self._launch = replace(self._launch, arguments=arguments)
            await self.start()

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._launch.drain_s + _END_S):
                    await process.wait()
        if process.returncode is None:
            engine = self._launch.kind.engine
            logger.warning("The %s server did not stop in time and is killed", engine, extra={"pid": process.pid})
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # it has its own session
        await process.wait()

    async def _pass_on(self, output: asyncio.StreamReader | None) -> None:
        """Forward its log lines; those that look serious become warnings."""
        assert output is not None
        its = logging.getLogger(self._launch.kind.engine.lower())
        while True:
            try:
                line = await output.readline()
            except ValueError:  # the line is too long
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._last_lines = [*self._last_lines, text][-_NUM_LAST_LINES:]
            level = logging.WARNING if _SERIOUS.search(text) else logging.INFO
            its.log(level, "%s", text)


@asynccontextmanager
async def supervised(launch: ServerCommand) -> AsyncIterator[Supervisor]:
    async with asyncio.TaskGroup() as tasks:
        supervisor = Supervisor(launch, tasks)
        await supervisor.start()
        try:
            yield supervisor
        finally:
            await asyncio.shield(supervisor.stop())


async def until_up(
    engine: str,
    is_up: Callable[[], Awaitable[bool]],
    *,
    is_stopped: Callable[[], bool],
    has_ended: Callable[[], bool] = lambda: False,
) -> None:
    """Return when the server serves or has ended, logging progress. Raises Unavailable if this process is stopping.

    There is no time limit, because a large model may load slowly, and the probes of the pod report that it is starting.
    """
    loop = asyncio.get_running_loop()
    started_s = logged_s = loop.time()
    while not has_ended():
        if await is_up():
            logger.info("The %s server is up", engine, extra={"after_s": round(loop.time() - started_s)})
            return
        if is_stopped():
            raise Unavailable(f"stopped before the {engine} server was up")
        if loop.time() - logged_s > _LOG_S:
            logged_s = loop.time()
            logger.info("Waiting for %s", engine, extra={"for_s": round(logged_s - started_s)})
        await asyncio.sleep(_POLL_S)
