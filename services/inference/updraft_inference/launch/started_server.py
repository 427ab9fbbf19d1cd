"""A server with a draft, started for the duration of a block; it can start again with another draft."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_chassis.errors import UpdraftError
from updraft_chassis.lifecycle import Stop
from updraft_inference.launch import files
from updraft_inference.launch.supervisor import ServerCommand, Supervisor, environment, supervised
from updraft_inference.tap.server_kind import ServerKind

logger = logging.getLogger(__name__)

_LOOK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to start a server. `folder` receives the plugin and the initial draft."""

    kind: ServerKind
    python: Path
    model: Path
    folder: Path
    shape: ShapeChoice
    socket: Path
    arguments: Callable[[Path], Sequence[str]]
    """The arguments for an initial draft in this folder."""
    is_up: Callable[[], Awaitable[bool]]
    """Whether the server serves; called about twice per second until it does."""
    is_stopped: Callable[[], bool]
    """Whether this process is stopping, which ends all waiting for the server."""
    drain_s: float


class StartedServer:
    """`draft` is the folder of the draft that it started with. `is_starting` until it serves, and again while it restarts."""

    def __init__(self, plan: Plan, supervisor: Supervisor, draft: Path) -> None:
        self._plan = plan
        self._supervisor = supervisor
        self.draft = draft
        self.is_starting = True

    @property
    def has_ended(self) -> bool:
        return self._supervisor.has_ended

    async def ready(self) -> None:
        """Wait until it serves. Raises Unavailable if it ends first, or if this process is stopping."""
        await self._supervisor.ready(self._plan.is_up, self._plan.is_stopped)
        self.is_starting = False

    async def ended(self, stop: Stop) -> None:
        """Return when `stop` is requested. Raises Unavailable, with its last log lines, if the server ends before."""
        while not await stop.wait(_LOOK_S):
            if self.has_ended and not self.is_starting:
                raise await self._supervisor.failure()

    async def restart(self, draft: Path) -> Path:
        """Restart the server with another draft after running requests have finished; return where that draft is kept.

        Raises Unavailable if the server does not serve with it. Then it runs with the previous draft.
        """
        before, self.is_starting = self.draft, True
        try:
            await self.start_with(draft)
        except UpdraftError as error:
            if not self._plan.is_stopped():
                extra = {"draft": str(draft), "reason": str(error)}
                logger.error("The server does not start with another draft", extra=extra)
                await self.start_with(before)
            raise
        finally:
            self.is_starting = False
        return self.draft

    async def start_with(self, draft: Path) -> None:
        """Restart the server with this draft after running requests have finished, and wait until it serves."""
        kept = await asyncio.to_thread(files.kept, draft, self._plan.folder)
        await self._supervisor.restart(self._plan.arguments(kept))
        await self.ready()
        self.draft = kept
        await asyncio.to_thread(files.remove_others, kept)

    async def stop(self) -> None:
        """Let running requests finish, then stop the server."""
        await self._supervisor.stop()


@asynccontextmanager
async def started(plan: Plan, environ: Mapping[str, str]) -> AsyncIterator[StartedServer]:
    """Start a server without waiting until it serves. It stops when the block ends."""
    ready = await asyncio.to_thread(files.prepared, plan.kind, plan.model, plan.folder, plan.shape)
    command = ServerCommand(
        kind=plan.kind,
        python=plan.python,
        arguments=plan.arguments(ready.draft),
        environment=environment(plan.kind, environ, plugin=ready.plugin, socket=plan.socket.resolve()),
        drain_s=plan.drain_s,
    )
    async with supervised(command) as supervisor:
        yield StartedServer(plan, supervisor, ready.draft)
