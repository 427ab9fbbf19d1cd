"""From settings to a running engine: over a server that is attached to, or one that is started and ended here."""

import asyncio
import logging
import shlex
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from updraft_artifacts.model_folder import target_fingerprint
from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_inference.engine import FinishedSink
from updraft_inference.sglang_engine import initial_draft as seeds
from updraft_inference.sglang_engine.engine import SglangEngine, SglangOptions, opened
from updraft_inference.sglang_engine.launch import admin_key as admin_keys
from updraft_inference.sglang_engine.launch import arguments, plugin_folder
from updraft_inference.sglang_engine.launch.supervisor import (
    ServerCommand,
    environment,
    free_port,
    supervised,
    until_up,
)
from updraft_inference.sglang_engine.server import SglangServer

logger = logging.getLogger(__name__)

_STARTED_WITH = "started-with-"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """How to start a server. `folder` gets the plugin and the first draft; `extra` are arguments as in a shell."""

    python: Path
    folder: Path
    num_steps: int
    num_slots: int
    max_context: int | None
    dtype: str
    draft_vocab_size: int
    extra: str
    admin_key: str
    may_restart: bool
    drain_s: float


def prepare(model: Path, *, plugin: Path, seed: Path, draft_vocab_size: int, key_file: Path | None = None) -> None:
    """Write what a server starts with. Doing it twice changes nothing."""
    plugin_folder.write(plugin)
    seeds.write(model, seed, draft_vocab_size=draft_vocab_size)
    if key_file is not None:
        admin_keys.write(key_file)
    logger.info("Prepared for SGLang", extra={"plugin": str(plugin), "seed": str(seed)})


@asynccontextmanager
async def attached(
    options: SglangOptions, url: str, admin_key: str, on_finished: FinishedSink, is_stopped: Callable[[], bool]
) -> AsyncIterator[SglangEngine]:
    """An engine over the server at `url`, once it is up."""
    async with SglangServer(url, admin_key=admin_key) as server:
        await until_up(server, is_stopped=is_stopped)
        async with opened(options, server, on_finished) as engine:
            yield engine


@asynccontextmanager
async def started(
    plan: LaunchOptions,
    options: SglangOptions,
    environ: Mapping[str, str],
    on_finished: FinishedSink,
    is_stopped: Callable[[], bool],
) -> AsyncIterator[SglangEngine]:
    """A server for the length of the block, and an engine over it."""
    plugin, seed = await asyncio.to_thread(_prepared, plan, options.model)
    port = free_port()
    launch = ServerCommand(
        python=plan.python,
        arguments=_arguments(plan, options, seed, port),
        environment=environment(environ, plugin=plugin, collector=options.socket.resolve()),
        drain_s=plan.drain_s,
    )
    async with (
        SglangServer(f"http://127.0.0.1:{port}", admin_key=plan.admin_key) as server,
        supervised(launch) as supervisor,
    ):
        await supervisor.ready(server, is_stopped)

        async def restart(draft: Path) -> None:
            kept = await asyncio.to_thread(_kept, draft, plan.folder)
            await supervisor.restart(_arguments(plan, options, kept, port))
            await supervisor.ready(server, is_stopped)
            await asyncio.to_thread(_remove_others, kept)

        async with opened(
            options,
            server,
            on_finished,
            has_ended=lambda: supervisor.has_ended,
            restart=restart if plan.may_restart else None,
        ) as engine:
            yield engine


def _prepared(plan: LaunchOptions, model: Path) -> tuple[Path, Path]:
    """Plugin and seed, each model and vocabulary its own."""
    name = f"seed-{target_fingerprint(model).removeprefix('sha256:')[:12]}-{plan.draft_vocab_size}"
    plugin, seed = (plan.folder / part for part in ("plugin", name))
    prepare(model, plugin=plugin, seed=seed, draft_vocab_size=plan.draft_vocab_size)
    return plugin.resolve(), seed.resolve()


def _kept(draft: Path, folder: Path) -> Path:
    """A draft to start with that nobody removes: versions are pruned, and this one is gone back to."""
    if draft.resolve().is_relative_to(folder.resolve()):
        return draft
    kept = (folder / f"{_STARTED_WITH}{draft.name}").resolve()
    shutil.rmtree(kept, ignore_errors=True)
    try:
        shutil.copytree(draft, kept)
    except (OSError, shutil.Error) as error:
        raise Unavailable(f"the draft in {draft} cannot be kept for a start: {error}") from error
    return kept


def _remove_others(kept: Path) -> None:
    """Drafts that servers before this one were started with."""
    for other in set(kept.parent.glob(f"{_STARTED_WITH}*")) - {kept}:
        shutil.rmtree(other, ignore_errors=True)


def _arguments(plan: LaunchOptions, options: SglangOptions, draft: Path, port: int) -> list[str]:
    try:
        extra = shlex.split(plan.extra)
    except ValueError as error:
        raise InvalidInput(f"UPDRAFT_INFERENCE_SGLANG_ARGS cannot be read: {error}") from error
    return arguments.serving(
        options.model.resolve(),
        port=port,
        num_slots=plan.num_slots,
        dtype=plan.dtype,
        extra=[
            *arguments.speculation(draft, plan.num_steps),
            *(("--admin-api-key", plan.admin_key) if plan.admin_key else ()),
            *(arguments.context(options.model, plan.max_context, plan.num_steps) if plan.max_context else ()),
            *extra,
        ],
    )
