"""Builds the inference process and connects its parts, except for the inside of the engine.

At startup the port answers with 503 while the model loads. Then the pod loads the draft that the registry orders, or
the last one if the registry is away, and becomes ready. On SIGTERM it stops accepting requests, finishes running ones
and flushes traces. Registry and Redis may come and go at any time.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from updraft_artifacts import transfer
from updraft_artifacts.digests import tensors_digest
from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import Unavailable
from updraft_chassis.lifecycle import Stop
from updraft_chassis.settings import variable
from updraft_draft import checkpoint
from updraft_inference import pod
from updraft_inference.agent.capture import Capture
from updraft_inference.agent.completions import CompletionListeners
from updraft_inference.agent.drafts import verified
from updraft_inference.agent.selection import CapturePlan, CaptureTerms, Refusal
from updraft_inference.engine import DraftCheckpoint, Engine, FinishedSink, HolderInfo
from updraft_inference.http.body import BodyLimits
from updraft_inference.http.connection import ClientLimits
from updraft_inference.http.generation import ServedModel
from updraft_inference.http.keys import Keys
from updraft_inference.http.readiness import Readiness, ServingPhase
from updraft_inference.http.routes import app
from updraft_inference.http.server import Server, listen
from updraft_inference.metrics import Metrics, watch_engine, watch_holder, watch_lookahead, watch_speedups
from updraft_inference.settings import InferenceSettings
from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.tokenization import Tokenizer

logger = logging.getLogger(__name__)

OpenEngine = Callable[[InferenceSettings, FinishedSink], AbstractAsyncContextManager[Engine]]
"""Loads the model and runs the engine for the duration of the block."""

_FLUSH_S = 5.0
_WATCH_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    tools: pod.Tools
    readiness: Readiness[ServedModel]
    completions: CompletionListeners


async def serve(settings: InferenceSettings, stop: Stop, open_engine: OpenEngine) -> None:
    """Run the process until `stop`. Raises UpdraftError if it cannot start."""
    tokenizer = await asyncio.to_thread(Tokenizer.open, settings.model)
    chat_template = await asyncio.to_thread(ChatTemplate.open, settings.model)
    registry = CollectorRegistry()
    base = _Base(
        tools=pod.Tools(settings=settings, metrics=Metrics(registry), clock=SystemClock()),
        readiness=Readiness(max_inside=settings.max_connections),
        completions=CompletionListeners(asyncio.get_running_loop()),
    )
    keys = Keys(settings.api_keys_file, max_at_once=settings.max_requests_per_key, tenant_header=settings.tenant_header)
    bodies = BodyLimits(max_bytes=settings.max_body_bytes, timeout_s=settings.stall_seconds)
    server = Server(
        app(base.readiness, base.tools.metrics, registry, bodies, keys),
        ClientLimits(max_connections=settings.max_connections, stall_s=settings.stall_seconds),
        None if settings.tls is None else settings.tls.context(),
    )
    socket = listen(settings.host, settings.port, setting=variable(InferenceSettings, "port"))
    logger.info("Listening", extra={"host": settings.host, "port": socket.getsockname()[1]})
    async with asyncio.TaskGroup() as tasks:
        http = tasks.create_task(server.serve(sockets=[socket]))
        async with (
            open_engine(settings, base.completions.sink) as engine,
            _agent(base, engine) as agent,
            asyncio.TaskGroup() as background,  # ends before the engine and the agent
        ):
            watch_engine(registry, engine)
            watch_holder(registry, engine)
            base.tools.metrics.observe_kernels(engine.info.kernels)
            watch_lookahead(registry, engine.lookahead_estimates)
            watch_speedups(registry, engine)
            jobs = (_watch(engine), pod.release_memory(), *agent.jobs)
            running = [background.create_task(job) for job in jobs]
            await agent.settled.wait()
            base.readiness.open(
                ServedModel(
                    model=settings.model_name,
                    engine=engine,
                    tokenizer=tokenizer,
                    chat_template=chat_template,
                    completions=base.completions,
                    plan=agent.plan,
                )
            )
            logger.info("Ready", extra={"model": settings.model_name, "draft_version": engine.loaded.version})
            await stop.event.wait()
            base.readiness.drain()
            agent.changed.set()
            await _drained(base.readiness, settings.drain_seconds)
            server.stop()
            await http
            await agent.flush()
            for task in running:
                task.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Agent:
    """Captures, reports and swaps for one pod."""

    changed: asyncio.Event
    capture: Capture | None
    jobs: list[Coroutine[Any, Any, None]]
    settled: asyncio.Event
    """Set once the draft that is available locally serves."""

    def plan(self, trace_id: bytes, terms: CaptureTerms) -> CapturePlan:
        if self.capture is None:
            refusal = Refusal.OPTED_OUT if terms.is_opted_out else None
            return CapturePlan(trace_id=trace_id, refusal=refusal, domain="" if refusal else terms.domain)
        return self.capture.plan(trace_id, terms)

    async def flush(self) -> None:
        if self.capture is not None:
            await self.capture.flush(_FLUSH_S)


@asynccontextmanager
async def _agent(base: _Base, engine: Engine) -> AsyncIterator[_Agent]:
    base.completions.subscribe(lambda finished, _: base.tools.metrics.observe(finished))
    changed, settled = asyncio.Event(), asyncio.Event()
    async with AsyncExitStack() as stack:
        capture = await pod.open_capture(base.tools, engine.info, stack)
        if capture is not None:
            base.completions.subscribe_to_starts(capture.start, capture.give_back)
            base.completions.subscribe(capture.offer)
        jobs: list[Coroutine[Any, Any, None]] = [] if capture is None else [capture.run()]
        if base.tools.settings.registry_address:
            fleet = await pod.open_fleet(
                base.tools,
                engine,
                capture,
                stack,
                changed=changed,
                is_draining=lambda: base.readiness.phase is ServingPhase.DRAINING,
            )
            base.completions.subscribe(fleet.state.count)
            jobs += fleet.jobs
            settled = fleet.swapper.settled
        else:
            if base.tools.settings.draft_path is not None:
                await _load_fixed(base, engine, base.tools.settings.draft_path)
            settled.set()
        yield _Agent(changed=changed, capture=capture, jobs=jobs, settled=settled)


async def _load_fixed(base: _Base, engine: Engine, folder: Path) -> None:
    await engine.swap(await asyncio.to_thread(_fixed_draft, folder, engine.info))
    base.tools.metrics.draft_version.set(engine.loaded.version)


def _fixed_draft(folder: Path, info: HolderInfo) -> DraftCheckpoint:
    """Read a checkpoint folder as a draft; with a manifest its contents must match it.

    The version is the folder name if that is a number, as in the stores of registries and pods; otherwise 1.
    """
    version = int(folder.name) if folder.name.isdecimal() else 1
    if (folder / transfer.MANIFEST).is_file():
        return verified(folder, version, info)
    _, weights = checkpoint.load(folder)
    digest = tensors_digest(checkpoint.tensor_specs(sorted(weights.items())))
    return DraftCheckpoint(version=version, folder=folder, tensors_digest=digest)


async def _watch(engine: Engine) -> None:
    """End the process when the engine has failed, because only a restart can help."""
    while engine.is_alive:  # noqa: ASYNC110 - a dying thread sets no event
        await asyncio.sleep(_WATCH_S)
    raise Unavailable("the engine has failed; see the log above for the cause")


async def _drained(readiness: Readiness[ServedModel], timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await readiness.empty()
    if readiness.num_inside:
        extra = {"requests": readiness.num_inside, "after_s": timeout_s}
        logger.warning("Requests were cut off because they did not finish in time", extra=extra)
