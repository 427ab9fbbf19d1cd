"""Builds the agent beside a server and connects its parts.

It is ready as soon as it listens: the server's readiness is the server's own. It joins the fleet when the server's plugin has
connected for the first time, and captures as much as its credits allow. On SIGTERM it flushes traces.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry

from updraft_artifacts.model_folder import quantization, target_fingerprint, tokenizer_fingerprint
from updraft_artifacts.sizing import RUNNING_BYTES
from updraft_chassis import metrics as probes
from updraft_chassis.clock import SystemClock
from updraft_chassis.credentials import server_context
from updraft_chassis.errors import Unavailable
from updraft_chassis.lifecycle import Stop
from updraft_chassis.settings import variable
from updraft_draft.tensors import packed
from updraft_inference import pod
from updraft_inference.agent.capture import Capture
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.engine import FinishedRequest
from updraft_inference.launch import admin_key
from updraft_inference.metrics import Metrics, watch_holder, watch_speedups
from updraft_inference.settings import InferenceSettings
from updraft_inference.sidecar.assembly import Assembler, Ended
from updraft_inference.sidecar.attached import AttachedServer, Known, Restart
from updraft_inference.sidecar.link import Event, Link
from updraft_inference.sidecar.sglang.attached import AttachedSglang, Folders
from updraft_inference.sidecar.sglang.server import SglangServer
from updraft_inference.tap.server_kind import SGLANG, VLLM

logger = logging.getLogger(__name__)

_FLUSH_S = 5.0
_LOOK_S = 1.0

_CHANGE = 0.05
"""Share by which the fraction of captured requests must change until the server is sent another policy."""


async def serve(
    settings: InferenceSettings,
    stop: Stop,
    *,
    restart: Restart | None = None,
    is_starting: Callable[[], bool] = lambda: False,
) -> None:
    """Run the process until `stop`. `restart` starts the server with another draft; while it is starting, its plugin is not
    missed. Raises UpdraftError if the process cannot start."""
    registry = CollectorRegistry()
    tools = pod.Tools(settings=settings, metrics=Metrics(registry), clock=SystemClock())
    agent = _Agent(tools, await asyncio.to_thread(_known, settings))
    agent.server.restart = restart
    watch_holder(registry, agent.server)
    watch_speedups(registry, agent.server)
    with probes.serve(
        registry,
        host=settings.host,
        port=settings.metrics_port,
        ready=lambda: agent.is_listening,
        setting=variable(InferenceSettings, "metrics_port"),
        tls=server_context(settings.metrics_tls_cert_file, settings.metrics_tls_key_file),
    ) as port:
        async with agent.server.running(), asyncio.TaskGroup() as tasks:
            async with agent.listening():
                extra = {"socket": str(agent.link.path), "metrics": f"{settings.host}:{port}"}
                logger.info("Listening for the server's plugin", extra=extra)
                jobs = (agent.run(), agent.watch(is_starting), pod.release_memory())
                running = [tasks.create_task(job) for job in jobs]
                await stop.event.wait()
            await agent.flush()
            for task in running:
                task.cancel()


async def _until_there(authorities: Path | None) -> None:
    """Wait for the registry's CAs: an agent that exits without them would make the pod of another workload unready."""
    is_told = False
    while authorities is not None and not await asyncio.to_thread(authorities.exists):
        if not is_told:
            logger.warning("Waiting for the registry's CAs", extra={"file": str(authorities)})
        is_told = True
        await asyncio.sleep(_LOOK_S)


def _known(settings: InferenceSettings) -> Known:
    return Known(
        fingerprints=(target_fingerprint(settings.model), tokenizer_fingerprint(settings.model)),
        quantization=quantization(settings.model),
        initial=settings.initial_draft,
    )


class _Agent:
    def __init__(self, tools: pod.Tools, known: Known) -> None:
        settings = tools.settings
        self._tools = tools
        self._changed = asyncio.Event()
        self.is_listening = False
        self._capture: Capture | None = None
        self._fleet: pod.Fleet | None = None
        most = settings.capture_running_bytes or RUNNING_BYTES
        is_packed = settings.capture_encoding == "fp8"
        assembler = Assembler(max_bytes=most, pack=packed) if is_packed else Assembler(max_bytes=most)
        kind = VLLM if settings.engine == "vllm" else SGLANG
        self.link = Link(settings.socket_path, kind, assembler, self._hear, clock=tools.clock)
        self.server = _attached(settings, self.link, known, self._note_draft)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Receive the server's messages for the duration of the block, and handle the rest when it ends."""
        async with self.link.listening():
            self.is_listening = True
            yield
            self.is_listening = False
            self._changed.set()
        await asyncio.sleep(0)

    async def run(self) -> None:
        """Run the agent of the pod from the server's first connection on, until cancelled."""
        await self.server.met.wait()
        async with AsyncExitStack() as stack:
            self._capture = capture = await pod.open_capture(self._tools, self.server.info, stack)
            async with asyncio.TaskGroup() as tasks:
                if self._tools.settings.registry_address:
                    await _until_there(self._tools.settings.registry_ca_file)
                    self._fleet = await pod.open_fleet(
                        self._tools,
                        self.server,
                        capture,
                        stack,
                        changed=self._changed,
                        is_draining=lambda: not self.is_listening,
                    )
                    for job in self._fleet.jobs:
                        tasks.create_task(job)
                if capture is not None:
                    tasks.create_task(capture.run())
                    tasks.create_task(_push_policy(self.link, capture))

    async def watch(self, is_starting: Callable[[], bool] = lambda: False) -> None:
        """Log each new reason why nothing is captured, until cancelled. Raises Unavailable if only a restart helps."""
        logged = ""
        while not self.link.failure:
            problem = "" if is_starting() else self.link.problem
            if problem and problem != logged:
                level = logging.ERROR if self.server.met.is_set() else logging.WARNING  # a server may start slowly
                logger.log(level, "The draft does not learn from the server", extra={"reason": problem})
            logged = problem
            await asyncio.sleep(_LOOK_S)
        raise Unavailable(self.link.failure)

    async def flush(self) -> None:
        if self._capture is not None:
            await self._capture.flush(_FLUSH_S)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Ended):
            self._take(event)
        else:
            self.server.hear(event)

    def _take(self, ended: Ended) -> None:
        self._tools.metrics.observe(ended.counted)
        plan = self._plan(ended)
        if self._fleet is not None:
            self._fleet.state.count(ended.counted, plan)
        if self._capture is None:
            return
        if ended.finished is None or not (ended.terms.may_train or plan.params.payload):
            # A plugin chooses requests before anyone knows which ones are held out; nothing of the others may be stored.
            self._capture.count(ended.counted, plan)
        else:
            self._capture.offer(_planned(ended, plan), plan)

    def _plan(self, ended: Ended) -> CapturePlan:
        if self._capture is None:
            return CapturePlan(trace_id=ended.trace_id, domain="" if ended.terms.is_opted_out else ended.terms.domain)
        return self._capture.plan_of_chosen(ended.trace_id, ended.terms, ended.probability)

    def _note_draft(self) -> None:
        self._tools.metrics.draft_version.set(self.server.loaded.version)
        if self._fleet is not None:
            self._fleet.swapper.again()


def _attached(settings: InferenceSettings, link: Link, known: Known, on_change: Callable[[], None]) -> AttachedServer:
    if link.kind is VLLM:
        return AttachedServer(link, known, on_change=on_change)
    folders = Folders(model=settings.model, drafts=settings.draft_folder, note=settings.data_dir / "sglang-swap")
    key = admin_key.of(settings.sglang_admin_key.get_secret_value(), settings.sglang_admin_key_file)
    server = SglangServer(settings.attach, admin_key=key, is_own=settings.server_python is not None)
    return AttachedSglang(link, known, server, folders, on_change=on_change)


def _planned(ended: Ended, plan: CapturePlan) -> FinishedRequest:
    """The request, with the captured parts that its plan permits."""
    finished = ended.finished
    assert finished is not None
    hidden = finished.hidden if plan.params.payload else None
    if hidden is not None and not plan.params.counterfactual_rows:
        hidden = replace(hidden, counterfactuals=())
    return replace(finished, request=replace(finished.request, capture=plan.params), hidden=hidden)


async def _push_policy(link: Link, capture: Capture) -> None:
    """Send the server a capture policy whenever the credits change it, until cancelled."""
    sent = -1.0
    while True:
        payload = round(capture.payload_fraction, 4)
        if abs(payload - sent) > _CHANGE * sent or (payload != sent and payload in {0.0, 1.0}):
            rates = capture.rates
            policy = {"prompt_rows": rates.prompt_rows, "counterfactual_rows": rates.counterfactual_rows}
            link.set_policy({"payload": payload, **policy, "opt_in": rates.needs_opt_in})
            sent = payload
        await asyncio.sleep(_LOOK_S)
