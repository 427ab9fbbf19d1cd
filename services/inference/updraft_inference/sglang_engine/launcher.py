"""Opens an engine over an SGLang server, either attached or started for the duration of the block."""

import asyncio
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_chassis.errors import InvalidInput
from updraft_chassis.ports import free_port
from updraft_inference.engine import FinishedSink
from updraft_inference.launch import program, sglang_arguments
from updraft_inference.launch import started as servers
from updraft_inference.launch.supervisor import until_up
from updraft_inference.sglang_engine.engine import SglangEngine, SglangOptions, opened
from updraft_inference.sglang_engine.server import SglangServer

_PING_S = 2.0
_LATE_S = 15.0
"""After this long, a server that fails its health check may serve all the same: it remembers an earlier failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """How to start a server. `folder` receives the plugin and the initial draft; `extra` are arguments in shell syntax."""

    python: Path
    folder: Path
    num_steps: int
    num_slots: int
    max_context: int | None
    dtype: str
    shape: ShapeChoice
    extra: str
    admin_key: str
    may_restart: bool
    drain_s: float


@asynccontextmanager
async def attached(
    options: SglangOptions, url: str, admin_key: str, on_finished: FinishedSink, is_stopped: Callable[[], bool]
) -> AsyncIterator[SglangEngine]:
    async with SglangServer(url, admin_key=admin_key) as server:
        await until_up("SGLang", is_up(server), is_stopped=is_stopped)
        async with opened(options, server, on_finished) as engine:
            yield engine


@asynccontextmanager
async def started(
    launch: LaunchOptions,
    options: SglangOptions,
    environ: Mapping[str, str],
    on_finished: FinishedSink,
    is_stopped: Callable[[], bool],
) -> AsyncIterator[SglangEngine]:
    port = free_port()
    async with SglangServer(f"http://127.0.0.1:{port}", admin_key=launch.admin_key) as server:
        plan = servers.Plan(
            program=program.SGLANG,
            python=launch.python,
            model=options.model,
            folder=launch.folder,
            shape=launch.shape,
            socket=options.socket,
            arguments=lambda draft: _arguments(launch, options, draft, port),
            is_up=is_up(server),
            is_stopped=is_stopped,
            drain_s=launch.drain_s,
        )
        async with servers.started(plan, environ) as child:
            await child.ready()
            async with opened(
                options,
                server,
                on_finished,
                has_ended=lambda: child.has_ended,
                restart=child.start_with if launch.may_restart else None,
            ) as engine:
                yield engine


def is_up(server: SglangServer, *, late_s: float = _LATE_S) -> Callable[[], Awaitable[bool]]:
    """Whether the server serves; after `late_s` a token proves it too."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()

    async def serves() -> bool:
        return await server.is_up(_PING_S) or (loop.time() - started_s > late_s and await server.gives_tokens())

    return serves


def _arguments(launch: LaunchOptions, options: SglangOptions, draft: Path, port: int) -> list[str]:
    try:
        extra = shlex.split(launch.extra)
    except ValueError as error:
        raise InvalidInput(f"UPDRAFT_INFERENCE_SGLANG_ARGS is not valid shell syntax: {error}") from error
    return sglang_arguments.serving(
        options.model.resolve(),
        port=port,
        num_slots=launch.num_slots,
        dtype=launch.dtype,
        extra=[
            *sglang_arguments.speculation(draft, launch.num_steps),
            *(("--admin-api-key", launch.admin_key) if launch.admin_key else ()),
            *(
                sglang_arguments.context(options.model, launch.max_context, launch.num_steps)
                if launch.max_context
                else ()
            ),
            *extra,
        ],
    )
