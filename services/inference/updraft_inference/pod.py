"""Builds what makes a process the agent of a pod, whatever drafts in it: capture to Redis, and the fleet's stream.

Redis and the registry may come and go at any time.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from updraft.fleet.v1 import fleet_pb2
from updraft.fleet.v1.fleet_pb2_grpc import FleetStub
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft.trace.v1 import trace_pb2
from updraft_artifacts import model_folder, transfer
from updraft_artifacts.sizing import CapturedTraffic
from updraft_chassis import rpc, streams
from updraft_chassis.clock import Clock
from updraft_chassis.errors import InvalidInput
from updraft_chassis.settings import variable
from updraft_draft import memory, tensors
from updraft_inference.agent.capture import Capture, Sink
from updraft_inference.agent.chunks import chunk_bytes, most_context_rows
from updraft_inference.agent.drafts import DraftFolder
from updraft_inference.agent.fleet import FleetLink, LinkState
from updraft_inference.agent.report import PodState
from updraft_inference.agent.selection import CaptureRates, Permissions
from updraft_inference.agent.swap import Swapper
from updraft_inference.agent.trace import Origin
from updraft_inference.engine import DraftHolder, HolderInfo
from updraft_inference.metrics import Metrics
from updraft_inference.settings import InferenceSettings

if TYPE_CHECKING:  # these names exist in the stubs only
    from updraft.fleet.v1.fleet_pb2_grpc import FleetAsyncStub
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

_RELEASE_S = 30.0
"""Between two releases of free memory. One takes some 20 ms of a core."""

_ENCODINGS = {"fp8": trace_pb2.TENSOR_ENCODING_FP8_E4M3, "bf16": trace_pb2.TENSOR_ENCODING_BF16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    settings: InferenceSettings
    metrics: Metrics
    clock: Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A pod in the registry's fleet. `jobs` run until they are cancelled."""

    swapper: Swapper
    state: PodState
    jobs: tuple[Coroutine[Any, Any, None], ...]


async def open_capture(tools: Tools, info: HolderInfo, stack: AsyncExitStack) -> Capture | None:
    """None without a Redis. The connection closes with `stack`."""
    settings = tools.settings
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
        client,
        settings.stream_keys,
        max_bytes=settings.capture_max_bytes or sizes.stream.amount,
        retention_s=settings.capture_retention_seconds,
    )
    max_bytes = chunk_bytes(stream.max_entry_bytes)
    prompt_rows = most_context_rows(sizes.captured_token.amount, max_bytes=max_bytes)
    return Capture(
        CaptureRates(
            payload_fraction=settings.capture_payload_fraction,
            evaluation_fraction=settings.capture_evaluation_fraction,
            prompt_rows=min(settings.capture_prompt_rows, prompt_rows),
            counterfactual_rows=settings.capture_counterfactual_rows,
            permissions=Permissions(
                train=settings.capture_train, retain=settings.capture_retain, region=settings.capture_region
            ),
            needs_opt_in=settings.capture == "opt-in",
        ),
        Sink(
            stream=stream,
            origin=_origin(settings, info),
            encode=partial(tensors.encode, encoding=_ENCODINGS[settings.capture_encoding]),
            max_chunk_bytes=max_bytes,
        ),
        max_entries=settings.capture_queue_entries,
        max_bytes=settings.capture_queue_bytes or sizes.queue.amount,
        metrics=tools.metrics,
        clock=tools.clock,
    )


async def open_fleet(
    tools: Tools,
    holder: DraftHolder,
    capture: Capture | None,
    stack: AsyncExitStack,
    *,
    changed: asyncio.Event,
    is_draining: Callable[[], bool],
) -> Fleet:
    """Join the fleet of the configured registry. The connection closes with `stack`. Set `changed` to report at once."""
    settings, metrics, clock = tools.settings, tools.metrics, tools.clock
    channel = await stack.enter_async_context(rpc.channel(settings.registry_address, settings.registry_credentials))
    registry: RegistryAsyncStub = RegistryStub(channel)
    fleet: FleetAsyncStub = FleetStub(channel)
    drafts = draft_folder(settings)

    async def fetch(version: int, digest: str | None) -> Path:
        return await transfer.download(registry, settings.speculator, version, drafts.path, digest=digest)

    def follow(directive: fleet_pb2.Directive) -> None:
        if capture is not None:
            _follow(capture, directive)
        holder.compare(is_comparing=directive.comparing)
        swapper.accept(directive)

    def note(state: LinkState) -> None:
        metrics.registry_connected.set(state is LinkState.UP)
        metrics.registry_denials.inc(state is LinkState.DENIED)
        if state is not LinkState.UP:
            holder.compare(is_comparing=False)
            swapper.go_alone()

    swapper = Swapper(holder, drafts, fetch, metrics=metrics, clock=clock, on_change=changed.set)
    pod = PodState(
        origin=_origin(settings, holder.info),
        engine=holder,
        swapper=swapper,
        capture=capture,
        is_draining=is_draining,
        clock=clock,
    )
    fleet_link = FleetLink(fleet, pod.report, follow, changed=changed, on_link=note, report_s=settings.report_seconds)
    return Fleet(swapper=swapper, state=pod, jobs=(fleet_link.run(), swapper.run(), swapper.watch()))


def _follow(capture: Capture, directive: fleet_pb2.Directive) -> None:
    if directive.HasField("capture"):
        capture.follow(directive.capture)
    if directive.tenant_salt:
        capture.hash_with(directive.tenant_salt)


def draft_folder(settings: InferenceSettings) -> DraftFolder:
    """Where the drafts of the speculator are kept. Raises InvalidInput if it cannot be written."""
    path = settings.draft_folder
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(
            f"cannot write drafts to {path} ({error.strerror}); change {variable(InferenceSettings, 'data_dir')}"
        ) from error
    return DraftFolder(path)


async def release_memory() -> None:
    """Until cancelled. Rows for capture outlive the tensors around them and leave gaps in the heap, which only grows with
    traffic."""
    while True:
        await asyncio.sleep(_RELEASE_S)
        await asyncio.to_thread(memory.release)


def _origin(settings: InferenceSettings, info: HolderInfo) -> Origin:
    return Origin(
        speculator=settings.speculator,
        pod=settings.pod_name,
        engine=info.engine,
        target_fingerprint=info.target_fingerprint,
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        quantization=info.quantization,
    )
