"""Opens an engine over an SGLang server, either attached or started for the duration of the block."""

import asyncio
import hashlib
import logging
import shlex
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_artifacts.model_folder import describe, target_fingerprint
from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_chassis.ports import free_port
from updraft_draft.config import DraftConfig
from updraft_inference.engine import FinishedSink
from updraft_inference.sglang_engine.engine import SglangEngine, SglangOptions, opened
from updraft_inference.sglang_engine.launch import admin_key as admin_keys
from updraft_inference.sglang_engine.launch import arguments
from updraft_inference.sglang_engine.launch.supervisor import (
    ServerCommand,
    environment,
    supervised,
    until_up,
)
from updraft_inference.sglang_engine.server import SglangServer
from updraft_inference.tap import initial_draft, plugin_folder

logger = logging.getLogger(__name__)

_STARTED_WITH = "started-with-"


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


def prepare(
    model: Path, *, plugin: Path, seed: Path, shape: ShapeChoice, config_json: str = "", key_file: Path | None = None
) -> None:
    plugin_folder.write(plugin)
    initial_draft.write(model, seed, shape, config_json)
    if key_file is not None:
        admin_keys.write(key_file)
    logger.info("Prepared for SGLang", extra={"plugin": str(plugin), "seed": str(seed)})


@asynccontextmanager
async def attached(
    options: SglangOptions, url: str, admin_key: str, on_finished: FinishedSink, is_stopped: Callable[[], bool]
) -> AsyncIterator[SglangEngine]:
    async with SglangServer(url, admin_key=admin_key) as server:
        await until_up(server, is_stopped=is_stopped)
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
    plugin, seed = await asyncio.to_thread(_prepared, launch, options.model)
    port = free_port()
    command = ServerCommand(
        python=launch.python,
        arguments=_arguments(launch, options, seed, port),
        environment=environment(environ, plugin=plugin, collector=options.socket.resolve()),
        drain_s=launch.drain_s,
    )
    async with (
        SglangServer(f"http://127.0.0.1:{port}", admin_key=launch.admin_key) as server,
        supervised(command) as supervisor,
    ):
        await supervisor.ready(server, is_stopped)

        async def restart(draft: Path) -> None:
            kept = await asyncio.to_thread(_kept, draft, launch.folder)
            await supervisor.restart(_arguments(launch, options, kept, port))
            await supervisor.ready(server, is_stopped)
            await asyncio.to_thread(_remove_others, kept)

        async with opened(
            options,
            server,
            on_finished,
            has_ended=lambda: supervisor.has_ended,
            restart=restart if launch.may_restart else None,
        ) as engine:
            yield engine


def _prepared(launch: LaunchOptions, model: Path) -> tuple[Path, Path]:
    """The plugin, and an initial draft per model and shape."""
    config = DraftConfig.of_target(describe(model), launch.shape)
    shape = hashlib.sha256(config.to_json().encode()).hexdigest()[:8]
    name = f"seed-{target_fingerprint(model).removeprefix('sha256:')[:12]}-{shape}"
    plugin, seed = (launch.folder / part for part in ("plugin", name))
    prepare(model, plugin=plugin, seed=seed, shape=launch.shape)
    return plugin.resolve(), seed.resolve()


def _kept(draft: Path, folder: Path) -> Path:
    """A copy of a draft to start with that pruning does not remove; the server may return to it."""
    if draft.resolve().is_relative_to(folder.resolve()):
        return draft
    kept = (folder / f"{_STARTED_WITH}{draft.name}").resolve()
    shutil.rmtree(kept, ignore_errors=True)
    try:
        shutil.copytree(draft, kept)
    except (OSError, shutil.Error) as error:
        raise Unavailable(f"cannot copy the draft in {draft}: {error}") from error
    return kept


def _remove_others(kept: Path) -> None:
    """Remove the drafts of earlier starts."""
    for other in set(kept.parent.glob(f"{_STARTED_WITH}*")) - {kept}:
        shutil.rmtree(other, ignore_errors=True)


def _arguments(launch: LaunchOptions, options: SglangOptions, draft: Path, port: int) -> list[str]:
    try:
        extra = shlex.split(launch.extra)
    except ValueError as error:
        raise InvalidInput(f"UPDRAFT_INFERENCE_SGLANG_ARGS is not valid shell syntax: {error}") from error
    return arguments.serving(
        options.model.resolve(),
        port=port,
        num_slots=launch.num_slots,
        dtype=launch.dtype,
        extra=[
            *arguments.speculation(draft, launch.num_steps),
            *(("--admin-api-key", launch.admin_key) if launch.admin_key else ()),
            *(arguments.context(options.model, launch.max_context, launch.num_steps) if launch.max_context else ()),
            *extra,
        ],
    )
