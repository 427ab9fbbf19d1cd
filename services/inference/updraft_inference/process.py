"""The inference process: its settings first, which cost nothing, and torch after them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from updraft_chassis import lifecycle, logs, settings
from updraft_inference.engine.port import Drafter, Engine, FinishedSink
from updraft_inference.settings import InferenceSettings

PROCESS = "updraft-inference"


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    loaded = settings.load(InferenceSettings)
    logs.configure(process="inference", level=loaded.log_level, format=loaded.log_format)
    from updraft_inference import composition  # noqa: PLC0415 - torch: bad settings first

    async def serve(stop: lifecycle.Stop) -> None:
        await composition.serve(loaded, stop, open_engine)

    lifecycle.run(PROCESS, serve)


@asynccontextmanager
async def open_engine(settings: InferenceSettings, on_finished: FinishedSink) -> AsyncIterator[Engine]:
    """The torch engine on the model of the settings, running for the length of the block."""
    import asyncio  # noqa: PLC0415

    import torch  # noqa: PLC0415 - see main

    from updraft_inference.torch_engine.decoder import Limits  # noqa: PLC0415
    from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine  # noqa: PLC0415

    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    options = EngineOptions(
        limits=Limits(num_slots=settings.num_slots, max_context=settings.max_context, max_lookahead=settings.lookahead),
        dtype=getattr(torch, settings.dtype),
        device=settings.device,
        drafter=Drafter.EAGLE3 if settings.drafter == "auto" else Drafter(settings.drafter),
        max_queued=settings.max_queued_requests,
    )
    engine = await asyncio.to_thread(TorchEngine.open, settings.model, options, on_finished)
    async with engine:
        yield engine
