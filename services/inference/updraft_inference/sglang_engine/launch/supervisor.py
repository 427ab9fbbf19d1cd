"""Runs a stock SGLang server as a child process: starts it, waits until it is up, forwards its log, and stops it gracefully.

SIGTERM goes only to its main process, which lets requests finish and stops the others; a SIGTERM to those would kill them.
After a deadline the whole process group is killed. If this process dies, the kernel sends the child a SIGTERM.
"""

import asyncio
import logging
import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_inference.sglang_engine.launch import arguments
from updraft_inference.sglang_engine.server import SglangServer

logger = logging.getLogger(__name__)

_LOG_S = 15.0
_POLL_S = 0.5
_MAX_LINE = 1 << 20
_NUM_LAST_LINES = 15

_LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has gone")
os.execv(sys.executable, [sys.executable, "-m", "sglang.launch_server", *sys.argv[2:]])
"""
"""Run by the server's interpreter: requests a SIGTERM when the parent dies (PR_SET_PDEATHSIG), then becomes the server."""

_SERIOUS = re.compile(r"\bERROR\b|\bCRITICAL\b|Traceback|Error:|Exception:")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCommand:
    """The command to run. `environment` is complete."""

    python: Path
    arguments: Sequence[str]
    environment: Mapping[str, str]
    drain_s: float
    """How long running requests may take to finish."""


def environment(inherited: Mapping[str, str], *, plugin: Path, collector: Path) -> dict[str, str]:
    """The server's environment: ours without our settings, which contain secrets, plus the plugin's."""
    passed = {name: value for name, value in inherited.items() if not name.startswith("UPDRAFT_INFERENCE_")}
    paths = [str(plugin), *filter(None, [passed.get("PYTHONPATH")])]
    allowed = passed.get("SGLANG_PLUGINS")
    return passed | {
        "PYTHONPATH": os.pathsep.join(paths),
        arguments.SOCKET_VARIABLE: str(collector),
        **({} if not allowed else {"SGLANG_PLUGINS": f"{allowed},updraft"}),
    }


class Supervisor:
    def __init__(self, launch: ServerCommand, tasks: asyncio.TaskGroup) -> None:
        self._launch = launch
        self._tasks = tasks
        self._process: asyncio.subprocess.Process | None = None
        self._last_lines: list[str] = []

    @property
    def has_ended(self) -> bool:
        return self._process is None or self._process.returncode is not None

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
                f"cannot start {launch.python} ({error.strerror}); UPDRAFT_INFERENCE_SGLANG_PYTHON must be the"
                " Python interpreter of an environment with SGLang"
            ) from error
        self._tasks.create_task(self._pass_on(self._process.stdout))

    async def ready(self, server: SglangServer, is_stopped: Callable[[], bool]) -> None:
        """Wait until it serves. Raises Unavailable, with its last log lines, if it ends first, or if this process is
        stopping."""
        await until_up(server, is_stopped=is_stopped, has_ended=lambda: self.has_ended)
        if self.has_ended:
            status = None if self._process is None else self._process.returncode
            raise Unavailable(f"the SGLang server ended with status {status}; its last lines:\n" + self._last_words)

    @property
    def _last_words(self) -> str:
        return "\n".join(self._last_lines)

    async def stop(self) -> None:
        """Let it drain, then kill the rest of its process group."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._launch.drain_s):
                    await process.wait()
        if process.returncode is None:
            logger.warning("The SGLang server did not stop in time and is killed", extra={"pid": process.pid})
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # it has its own session
        await process.wait()

    async def restart(self, arguments: Sequence[str]) -> None:
        await self.stop()
        self._launch = replace(self._launch, arguments=arguments)
        await self.start()

    async def _pass_on(self, output: asyncio.StreamReader | None) -> None:
        """Forward its log lines; those that look serious become warnings."""
        assert output is not None
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
            logging.getLogger("sglang").log(level, "%s", text)


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
    server: SglangServer, *, is_stopped: Callable[[], bool], has_ended: Callable[[], bool] = lambda: False
) -> None:
    """Return when the server serves or has ended, logging progress. Raises Unavailable if this process is stopping.

    There is no time limit, because a large model may load slowly, and the probes of the pod report that it is starting.
    """
    loop = asyncio.get_running_loop()
    started_s = logged_s = loop.time()
    while not has_ended():
        is_late = loop.time() - logged_s > _LOG_S
        if await server.is_up(_POLL_S * 4) or (
            is_late and await server.gives_tokens()
        ):  # it may serve although /ping fails
            logger.info("The SGLang server is up", extra={"url": server.url, "after_s": round(loop.time() - started_s)})
            return
        if is_stopped():
            raise Unavailable("stopped before the SGLang server was up")
        if is_late:
            logged_s = loop.time()
            logger.info("Waiting for SGLang", extra={"url": server.url, "for_s": round(logged_s - started_s)})
        await asyncio.sleep(_POLL_S)
