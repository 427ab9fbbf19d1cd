"""The inference process. Settings are checked before torch is imported, because the import takes seconds."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from updraft_chassis import lifecycle, logs, progress, settings
from updraft_draft import memory
from updraft_inference.engine import Drafter, Engine, FinishedSink
from updraft_inference.recording.options import RecordOptions
from updraft_inference.settings import InferenceSettings
from updraft_inference.tap.server_kind import SGLANG, VLLM, ServerKind
from updraft_inference.torch_engine.openmp import wait_briefly

PROCESS = "updraft-inference"

_NUM_KERNELS = 128
"""For the numbers of rows that most decode steps have."""


def main(environ: Mapping[str, str]) -> None:
    loaded = settings.load(InferenceSettings, environ)
    logs.configure(process="inference", level=loaded.log_level, format=loaded.log_format)
    limit_memory(loaded.engine)
    if loaded.engine != "torch":
        lifecycle.run(PROCESS, partial(_serve_beside, loaded, environ))
        return
    wait_briefly(os.environ)
    from updraft_inference import composition  # noqa: PLC0415 - torch: bad settings first

    lifecycle.run(PROCESS, lambda stop: composition.serve(loaded, stop, open_engine))


def limit_memory(engine: str) -> None:
    """Before torch is imported. Capture encodes in many threads, whatever the engine. Only an agent beside a server returns
    large blocks: an engine's temporary tensors may be as large, and would be mapped anew in each step."""
    memory.limit(os.environ, num_kernels=_NUM_KERNELS)
    if engine != "torch":
        memory.return_large_blocks(os.environ)


async def _serve_beside(loaded: InferenceSettings, environ: Mapping[str, str], stop: lifecycle.Stop) -> None:
    """Be the agent of a server, whose cores are not ours; with its interpreter, start that server."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request at INFO
    import torch  # noqa: PLC0415 - see main

    from updraft_inference.sidecar import composition, started  # noqa: PLC0415

    torch.set_num_threads(loaded.num_threads or 1)
    if loaded.server_python is not None:
        await started.serve(loaded, environ, stop)
    else:
        await composition.serve(loaded, stop)


def prepare_sglang(environ: Mapping[str, str], *, plugin: Path, seed: Path, key_file: Path | None) -> None:
    """Write the plugin, an initial draft for the configured model, and, with `key_file`, an admin key."""
    loaded = _prepared_for(environ)

    async def prepare(_: lifecycle.Stop) -> None:
        from updraft_inference.launch import admin_key  # noqa: PLC0415 - see main

        _write(loaded, SGLANG, plugin=plugin, seed=seed)
        if key_file is not None:
            admin_key.write(key_file)

    lifecycle.run(PROCESS, prepare)


def prepare_vllm(environ: Mapping[str, str], *, plugin: Path, seed: Path | None) -> None:
    """Write the plugin and, with `seed`, an initial draft for the configured model."""
    loaded = _prepared_for(environ)

    async def prepare(_: lifecycle.Stop) -> None:
        _write(loaded, VLLM, plugin=plugin, seed=seed)

    lifecycle.run(PROCESS, prepare)


def _write(loaded: InferenceSettings, kind: ServerKind, *, plugin: Path, seed: Path | None) -> None:
    from updraft_inference.launch import files  # noqa: PLC0415 - see main

    files.prepare(kind, loaded.model, plugin=plugin, draft=seed, shape=loaded.shape, config_json=loaded.draft_config)


def _prepared_for(environ: Mapping[str, str]) -> InferenceSettings:
    """The settings without those of a running pod."""
    unused = {settings.variable(InferenceSettings, field): "" for field in ("engine", "attach")}
    loaded = settings.load(InferenceSettings, {k: v for k, v in environ.items() if k.upper() not in unused})
    logs.configure(process="inference", level=loaded.log_level, format=loaded.log_format)
    return loaded


def record(environ: Mapping[str, str], options: RecordOptions) -> None:
    """Record answered requests in a folder; progress goes to stdout."""
    logs.configure(process="inference", level="ERROR", format="text")
    wait_briefly(os.environ)
    memory.limit(os.environ, num_kernels=_NUM_KERNELS)

    async def run(report: progress.Report) -> None:
        from updraft_inference.recording.recorder import STREAMS  # noqa: PLC0415 - see main
        from updraft_inference.recording.run import RecordingRun  # noqa: PLC0415
        from updraft_inference.torch_engine.model.config import TargetConfig  # noqa: PLC0415

        recording = RecordingRun(options, model_context=TargetConfig.from_folder(options.model).max_position)
        overrides = {
            "model": options.model,
            "num_slots": STREAMS,
            "max_context": recording.max_context,
            "engine": "torch",
        }
        names = {settings.variable(InferenceSettings, field): str(value) for field, value in overrides.items()}
        loaded = settings.load(InferenceSettings, {**environ, **names})
        async with open_engine(loaded, lambda _: None) as engine:
            await recording.record(engine, report)

    with lifecycle.errors_as_sentences(PROCESS), progress.on_stdout() as report:
        asyncio.run(run(report))


@asynccontextmanager
async def open_engine(settings: InferenceSettings, on_finished: FinishedSink) -> AsyncIterator[Engine]:
    """Run the torch engine on the configured model for the duration of the block."""
    import torch  # noqa: PLC0415 - see main

    from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine  # noqa: PLC0415
    from updraft_inference.torch_engine.model.config import TargetConfig  # noqa: PLC0415
    from updraft_inference.torch_engine.model.limits import Limits  # noqa: PLC0415

    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    max_context = settings.max_context
    if "max_context" not in settings.model_fields_set:
        max_context = min(max_context, TargetConfig.from_folder(settings.model).max_position)
    options = EngineOptions(
        limits=Limits(
            num_slots=settings.num_slots,
            max_context=max_context,
            max_lookahead=settings.lookahead,
            num_remembered=settings.remembered_tokens,
        ),
        dtype=getattr(torch, settings.dtype),
        device=settings.device,
        use_kernels=settings.kernels == "auto",
        drafter=Drafter.HYBRID if settings.drafter == "auto" else Drafter(settings.drafter),
        max_queued=settings.max_queued_requests,
    )
    engine = await asyncio.to_thread(TorchEngine.open, settings.model, options, on_finished)
    async with engine:
        yield engine
