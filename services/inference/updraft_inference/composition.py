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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry

from updraft.fleet.v1 import fleet_pb2
from updraft.fleet.v1.fleet_pb2_grpc import FleetStub
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft.trace.v1 import trace_pb2
from updraft_artifacts import model_folder, transfer
from updraft_artifacts.digests import tensors_digest
from updraft_artifacts.sizing import CapturedTraffic
from updraft_chassis import rpc, streams
from updraft_chassis.clock import Clock, SystemClock
from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_chassis.lifecycle import Stop
from updraft_chassis.settings import variable
from updraft_draft import checkpoint, memory, tensors
from updraft_inference.agent.capture import Capture, Sink
from updraft_inference.agent.chunks import chunk_bytes, most_context_rows
from updraft_inference.agent.completions import CompletionListeners
from updraft_inference.agent.drafts import DraftFolder, verified
from updraft_inference.agent.fleet import FleetLink, LinkState
from updraft_inference.agent.report import PodState
from updraft_inference.agent.selection import CapturePlan, CaptureRates, CaptureTerms, Permissions
from updraft_inference.agent.swap import Swapper
from updraft_inference.agent.trace import Origin
from updraft_inference.engine import DraftCheckpoint, Engine, EngineInfo, FinishedSink
from updraft_inference.http.body import BodyLimits
from updraft_inference.http.connection import ClientLimits
from updraft_inference.http.generation import ServedModel
from updraft_inference.http.keys import Keys
from updraft_inference.http.readiness import Readiness, ServingPhase
from updraft_inference.http.routes import app
from updraft_inference.http.server import Server, listen
from updraft_inference.metrics import Metrics, watch_engine, watch_lookahead, watch_speedups
from updraft_inference.settings import InferenceSettings
from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.tokenization import Tokenizer

if TYPE_CHECKING:  # these names exist in the stubs only
    from updraft.fleet.v1.fleet_pb2_grpc import FleetAsyncStub
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

logger = logging.getLogger(__name__)

OpenEngine = Callable[[InferenceSettings, FinishedSink], AbstractAsyncContextManager[Engine]]
"""Loads the model and runs the engine for the duration of the block."""

_FLUSH_S = 5.0
_WATCH_S = 1.0

_RELEASE_S = 30.0
"""Between two releases of free memory. One takes some 20 ms of a core."""

_ENCODINGS = {"fp8": trace_pb2.TENSOR_ENCODING_FP8_E4M3, "bf16": trace_pb2.TENSOR_ENCODING_BF16}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    settings: InferenceSettings
    metrics: Metrics
    clock: Clock
    readiness: Readiness[ServedModel]
    completions: CompletionListeners


async def serve(settings: InferenceSettings, stop: Stop, open_engine: OpenEngine) -> None:
    """Run the process until `stop`. Raises UpdraftError if it cannot start."""
    tokenizer = await asyncio.to_thread(Tokenizer.open, settings.model)
    chat_template = await asyncio.to_thread(ChatTemplate.open, settings.model)
    registry = CollectorRegistry()
    base = _Base(
        settings=settings,
        metrics=Metrics(registry),
        clock=SystemClock(),
        readiness=Readiness(max_inside=settings.max_connections),
        completions=CompletionListeners(asyncio.get_running_loop()),
    )
    keys = Keys(settings.api_keys_file, max_at_once=settings.max_requests_per_key)
    bodies = BodyLimits(max_bytes=settings.max_body_bytes, timeout_s=settings.stall_seconds)
    server = Server(
        app(base.readiness, base.metrics, registry, bodies, keys),
        ClientLimits(max_connections=settings.max_connections, stall_s=settings.stall_seconds),
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
            base.metrics.observe_kernels(engine.info.kernels)
            if engine.lookahead_estimates is not None:
                watch_lookahead(registry, engine.lookahead_estimates)
                watch_speedups(registry, engine)
            jobs = (_watch(engine, base.readiness), _release_memory(), *agent.jobs)
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
            domain = "" if terms.is_opted_out else terms.domain
            return CapturePlan(trace_id=trace_id, is_opted_out=terms.is_opted_out, domain=domain)
        return self.capture.plan(trace_id, terms)

    async def flush(self) -> None:
        if self.capture is not None:
            await self.capture.flush(_FLUSH_S)


@asynccontextmanager
async def _agent(base: _Base, engine: Engine) -> AsyncIterator[_Agent]:
    base.completions.subscribe(lambda finished, _: base.metrics.observe(finished))
    changed, settled = asyncio.Event(), asyncio.Event()
    async with AsyncExitStack() as stack:
        capture = await _capture(base, engine, stack)
        jobs: list[Coroutine[Any, Any, None]] = [] if capture is None else [capture.run()]
        if base.settings.registry_address:
            swapper, link = await _fleet(base, engine, capture, changed, stack)
            jobs += [link.run(), swapper.run(), swapper.watch()]
            settled = swapper.settled
        else:
            if base.settings.draft_path is not None:
                await _load_fixed(base, engine, base.settings.draft_path)
            settled.set()
        yield _Agent(changed=changed, capture=capture, jobs=jobs, settled=settled)


async def _capture(base: _Base, engine: Engine, stack: AsyncExitStack) -> Capture | None:
    settings = base.settings
    url = settings.redis_url.get_secret_value()
    if not url:
        return None
    client = streams.connect(url)
    stack.push_async_callback(client.aclose)
    traffic = CapturedTraffic(
        engine=settings.engine, encoding=settings.capture_encoding, prompt_rows=settings.capture_prompt_rows
    )
    sizes = await asyncio.to_thread(model_folder.sizes, settings.model, traffic)
    stream = streams.ShardedProducer(
        client, settings.stream_keys, max_bytes=settings.capture_max_bytes or sizes.stream.amount
    )
    max_bytes = chunk_bytes(stream.max_entry_bytes)
    prompt_rows = most_context_rows(sizes.captured_token.amount, max_bytes=max_bytes)
    capture = Capture(
        CaptureRates(
            payload_fraction=settings.capture_payload_fraction,
            evaluation_fraction=settings.capture_evaluation_fraction,
            prompt_rows=min(settings.capture_prompt_rows, prompt_rows),
            counterfactual_rows=settings.capture_counterfactual_rows,
            permissions=Permissions(
                train=settings.capture_train, retain=settings.capture_retain, region=settings.capture_region
            ),
        ),
        Sink(
            stream=stream,
            origin=_origin(settings, engine),
            encode=partial(tensors.encode, encoding=_ENCODINGS[settings.capture_encoding]),
            max_chunk_bytes=max_bytes,
        ),
        max_entries=settings.capture_queue_entries,
        max_bytes=settings.capture_queue_bytes or sizes.queue.amount,
        metrics=base.metrics,
        clock=base.clock,
    )

    base.completions.subscribe_to_starts(capture.start, capture.give_back)
    base.completions.subscribe(capture.offer)
    base.completions.subscribe_to_parts(capture.offer)
    return capture


async def _fleet(
    base: _Base, engine: Engine, capture: Capture | None, changed: asyncio.Event, stack: AsyncExitStack
) -> tuple[Swapper, FleetLink]:
    settings = base.settings
    channel = await stack.enter_async_context(rpc.channel(settings.registry_address, settings.registry_credentials))
    registry: RegistryAsyncStub = RegistryStub(channel)
    fleet: FleetAsyncStub = FleetStub(channel)
    drafts = _draft_folder(settings)

    async def fetch(version: int, digest: str | None) -> Path:
        return await transfer.download(registry, settings.speculator, version, drafts.path, digest=digest)

    def follow(directive: fleet_pb2.Directive) -> None:
        if capture is not None and directive.HasField("capture"):
            capture.follow(directive.capture)
        engine.compare(is_comparing=directive.comparing)
        swapper.accept(directive)

    def note(link: LinkState) -> None:
        base.metrics.registry_connected.set(link is LinkState.UP)
        base.metrics.registry_denials.inc(link is LinkState.DENIED)
        if link is not LinkState.UP:
            engine.compare(is_comparing=False)
            swapper.go_alone()

    swapper = Swapper(engine, drafts, fetch, metrics=base.metrics, clock=base.clock, on_change=changed.set)
    pod = PodState(
        origin=_origin(settings, engine),
        engine=engine,
        swapper=swapper,
        capture=capture,
        is_draining=lambda: base.readiness.phase is ServingPhase.DRAINING,
        clock=base.clock,
    )
    base.completions.subscribe(pod.count)
    link = FleetLink(fleet, pod.report, follow, changed=changed, on_link=note, report_s=settings.report_seconds)
    return swapper, link


def _origin(settings: InferenceSettings, engine: Engine) -> Origin:
    info = engine.info
    return Origin(
        speculator=settings.speculator,
        pod=settings.pod_name,
        engine=info.engine,
        target_fingerprint=info.target_fingerprint,
        tokenizer_fingerprint=info.tokenizer_fingerprint,
    )


def _draft_folder(settings: InferenceSettings) -> DraftFolder:
    path = settings.data_dir / "drafts" / settings.speculator
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(
            f"cannot write drafts to {path} ({error.strerror}); change {variable(InferenceSettings, 'data_dir')}"
        ) from error
    return DraftFolder(path)


async def _load_fixed(base: _Base, engine: Engine, folder: Path) -> None:
    await engine.swap(await asyncio.to_thread(_fixed_draft, folder, engine.info))
    base.metrics.draft_version.set(engine.loaded.version)


def _fixed_draft(folder: Path, info: EngineInfo) -> DraftCheckpoint:
    """Read a checkpoint folder as a draft; with a manifest its contents must match it.

    The version is the folder name if that is a number, as in the stores of registries and pods; otherwise 1.
    """
    version = int(folder.name) if folder.name.isdecimal() else 1
    if (folder / transfer.MANIFEST).is_file():
        return verified(folder, version, info)
    _, weights = checkpoint.load(folder)
    digest = tensors_digest(checkpoint.tensor_specs(sorted(weights.items())))
    return DraftCheckpoint(version=version, folder=folder, tensors_digest=digest)


async def _watch(engine: Engine, readiness: Readiness[ServedModel]) -> None:
    """End the process when the engine has failed, because only a restart can help.

    A draining pod goes on: an idle SGLang server ends first, while answers and traces may still be on their way.
    """
    while engine.is_alive or readiness.phase is ServingPhase.DRAINING:  # noqa: ASYNC110 - a dying thread sets no event
        await asyncio.sleep(_WATCH_S)
    raise Unavailable("the engine has failed; see the log above for the cause")


async def _release_memory() -> None:
    """Rows for capture outlive the tensors around them and leave gaps in the heap, which only grows with traffic."""
    while True:
        await asyncio.sleep(_RELEASE_S)
        await asyncio.to_thread(memory.release)


async def _drained(readiness: Readiness[ServedModel], timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await readiness.empty()
    if readiness.num_inside:
        extra = {"requests": readiness.num_inside, "after_s": timeout_s}
        logger.warning("Requests were cut off because they did not finish in time", extra=extra)
