"""The engine port over a running stock SGLang server.

Tokens arrive over HTTP, steps and hidden states over the socket of the plugin. Where they disagree, the totals and checksums
of the server are right. A request for something that SGLang fixes for the whole server (drafter, lookahead) is rejected.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from updraft_artifacts.model_folder import describe, target_fingerprint, tokenizer_fingerprint
from updraft_artifacts.sizing import running_bytes
from updraft_chassis.errors import Exhausted, InvalidInput, Unavailable, UpdraftError
from updraft_inference.engine import (
    CaptureLoss,
    Delta,
    DraftCheckpoint,
    EngineInfo,
    EngineLoad,
    FinishedRequest,
    FinishedSink,
    GenerationRequest,
    LoadedDraft,
    RestartNeededError,
    Speedup,
    SwapResult,
)
from updraft_inference.sglang_engine import request as requests
from updraft_inference.sglang_engine import versions
from updraft_inference.sglang_engine.collector import Collector
from updraft_inference.sglang_engine.draft_swap import ServedDraft
from updraft_inference.sglang_engine.request_session import RequestSession
from updraft_inference.sglang_engine.server import ServerInfo, SglangServer
from updraft_sglang.weights import LOADER

logger = logging.getLogger(__name__)

T = TypeVar("T")

Restart = Callable[[Path], Awaitable[None]]
"""Stops the server and starts it with the draft in this folder; returns when it is up."""

_PROBE_TIMEOUT_S = 5.0
_MAX_SILENT_PROBES = 3
_RETRY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangOptions:
    """How to use a server. `max_context` is a limit below the server's own; None: the server's."""

    model: Path
    socket: Path
    note: Path
    """Exists during a swap; see `ServedDraft.open`."""
    drafts: Path | None = None
    """Folder of versions, used to recognise a draft that the server already holds."""
    max_context: int | None = None
    max_queued: int = 256
    max_captured_bytes: int | None = None
    """Memory for the rows of running requests; None: for as many as the server runs."""
    hello_s: float = 10.0
    """How long startup waits for the plugin, which reports the draft that the server holds. It connects while the
    server starts."""
    probe_s: float = 2.0
    """Interval of checks that the server answers."""


class SglangEngine:
    lookahead_estimates = None
    speedups: Mapping[int, Speedup] = MappingProxyType({})
    """SGLang chooses the lookahead and does not report its estimates."""
    faults: Mapping[int, int] = MappingProxyType({})
    """SGLang reports no failures of drafting alone."""

    def __init__(
        self,
        server: SglangServer,
        served_draft: ServedDraft,
        collector: Collector,
        info: EngineInfo,
        server_info: ServerInfo,
        options: SglangOptions,
    ) -> None:
        self._server = server
        self._served_draft = served_draft
        self._collector = collector
        self.info = info
        self._server_info = server_info
        self._sessions: dict[str, RequestSession] = {}
        self._swap_lock = asyncio.Lock()
        self._is_gone = False
        self._is_restarting = False
        self._restart: Restart | None = None
        self._failed_starts: Counter[str] = Counter()
        """By digest of the draft."""
        self._options = options
        self._on_finished: FinishedSink = lambda _: None
        self._tasks = asyncio.TaskGroup()

    @property
    def loaded(self) -> LoadedDraft:
        return self._served_draft.loaded

    @property
    def load(self) -> EngineLoad:
        """The load through this agent; requests to the server's own port are not included."""
        num = len(self._sessions)
        return EngineLoad(
            running=min(num, self.info.num_slots),
            queued=max(0, num - self.info.num_slots),
            used_tokens=sum(session.num_tokens for session in self._sessions.values()),
            lookahead=self._collector.last_lookahead,
        )

    @property
    def capture_problem(self) -> str:
        return self._collector.problem

    @property
    def capture_losses(self) -> Mapping[CaptureLoss, int]:
        return self._collector.losses

    @property
    def is_alive(self) -> bool:
        return not self._is_gone

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        requests.check(request, self.info, self._server_info)
        if self._is_gone:
            raise Unavailable("the SGLang server is gone")
        if self._is_restarting:
            raise Unavailable("the SGLang server is restarting with another draft", retry_after_s=_RETRY_S)
        if len(self._sessions) >= self.info.num_slots + self._options.max_queued:
            raise Exhausted(f"the queue is full: {self._options.max_queued} requests are waiting")
        if request.request_id in self._sessions:
            raise InvalidInput(f"request {request.request_id} is already running")
        rid = f"{request.request_id}-{uuid.uuid4().hex[:8]}"
        session = self._sessions[request.request_id] = RequestSession(request=request, rid=rid)
        self._tasks.create_task(self._run_session(session))
        is_over = False
        try:
            while not is_over:
                delta = await session.deltas.get()
                if isinstance(delta, UpdraftError):
                    raise delta
                is_over = delta.finished is not None
                yield delta
        finally:
            if not is_over:
                self._cancel(session)

    async def swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        """See the port. Runs to its end even if the caller is cancelled."""
        async with self._swap_lock:
            return await self._to_its_end(self._swap(draft))

    def compare(self, *, is_comparing: bool) -> None:
        """SGLang mixes no proposers, so every step shows the draft alone."""

    async def rehash(self) -> LoadedDraft:
        async with self._swap_lock:
            return await self._served_draft.rehash()

    async def _swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        try:
            return await self._served_draft.swap(draft)
        except RestartNeededError:
            if self._restart is None or draft is None:
                raise
            return await self._restart_with(self._restart, draft)

    async def _restart_with(self, restart: Restart, draft: DraftCheckpoint) -> SwapResult:
        """Restart the server for a draft of another shape, after running requests have finished.

        Raises InvalidInput if the server fails to start with it for the second time but starts with the previous draft;
        Unavailable the first time.
        """
        started_s = time.monotonic()
        before, served = self._served_draft.start_folder, self._served_draft.good
        self._is_restarting = True
        try:
            try:
                await restart(draft.folder)
            except UpdraftError as error:
                logger.error("SGLang does not start with the new draft", extra={"reason": str(error)})
                await restart(before)  # also fails if this process is stopping
                await self._reopen(served)
                self._failed_starts[draft.tensors_digest] += 1
                is_second = self._failed_starts[draft.tensors_digest] > 1
                message = f"the SGLang server does not start with version {draft.version}: {error}"
                raise (InvalidInput if is_second else Unavailable)(message) from error
            await self._reopen(draft)
        finally:
            self._is_restarting = False
        return SwapResult(loaded=self.loaded, pause_s=time.monotonic() - started_s)

    async def _reopen(self, draft: DraftCheckpoint | None) -> None:
        self._served_draft = await ServedDraft.open(self._server, await self._server.info(), self._options.note)
        await self._served_draft.swap(draft)

    async def _run_session(self, session: RequestSession) -> None:
        """Run a request to its end; its reader gets the errors."""
        builder = self._collector.expect(session.rid, len(session.request.prompt_ids), session.request.capture)

        handing_over: asyncio.Task[None] | None = None

        async def pass_on(part: Callable[[], FinishedRequest]) -> None:
            self._on_finished(await asyncio.to_thread(part))

        def hand_over() -> None:
            nonlocal handing_over
            if handing_over is not None and not handing_over.done():
                return
            if (part := session.part(builder)) is not None:
                handing_over = self._tasks.create_task(pass_on(part))

        try:
            await session.run(self._server, self._server_info.num_steps, hand_over)
            if handing_over is not None:
                await handing_over  # parts come in order, and before the end
            finished = await session.finished(self._collector, builder)
        except UpdraftError as error:
            session.deltas.put_nowait(error)
        else:
            self._on_finished(finished)
            session.deltas.put_nowait(Delta(token_ids=(), finished=finished))
        finally:
            self._collector.forget(session.rid)
            self._sessions.pop(session.request.request_id, None)

    def _cancel(self, session: RequestSession) -> None:
        if session.is_over or session.is_cancelled or session.request.request_id not in self._sessions:
            return
        session.cancel()
        with suppress(RuntimeError):  # the group is ending, and so is the connection
            self._tasks.create_task(session.abort(self._server))

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it in a task of the engine, so that it survives the caller's cancellation."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        async def act() -> None:
            try:
                result = await work
            except (UpdraftError, OSError) as error:
                if not done.cancelled():
                    done.set_exception(error)
            else:
                if not done.cancelled():
                    done.set_result(result)

        task = self._tasks.create_task(act())
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            await asyncio.shield(task)
            raise

    async def _watch(self, has_ended: Callable[[], bool]) -> None:
        """Notice that the server has gone. Any answer counts, also of a paused or busy server."""
        silent = 0
        while not self._is_gone:
            await asyncio.sleep(self._options.probe_s)
            responds = await self._server.responds(_PROBE_TIMEOUT_S)
            if responds or self._is_restarting:  # a restart may have begun meanwhile
                silent = 0
                continue
            silent += 1
            self._is_gone = silent >= _MAX_SILENT_PROBES or has_ended()
        logger.critical("The SGLang server is gone", extra={"url": self._server.url})
        for session in self._sessions.values():
            session.deltas.put_nowait(Unavailable("the SGLang server is gone"))

    @asynccontextmanager
    async def running(
        self, on_finished: FinishedSink, has_ended: Callable[[], bool], restart: Restart | None
    ) -> AsyncIterator[None]:
        """Watch the server for the duration of the block, then cancel all requests."""
        self._on_finished, self._restart = on_finished, restart
        async with self._tasks:
            watch = self._tasks.create_task(self._watch(has_ended))
            try:
                yield
            finally:
                watch.cancel()
                for session in list(self._sessions.values()):
                    self._cancel(session)


@asynccontextmanager
async def opened(
    options: SglangOptions,
    server: SglangServer,
    on_finished: FinishedSink,
    *,
    has_ended: Callable[[], bool] = lambda: False,
    restart: Restart | None = None,
) -> AsyncIterator[SglangEngine]:
    """An engine over a server that is up, for the duration of the block. Raises InvalidInput if the server is unsuitable.

    `has_ended` and `restart` are from the caller that started the server.
    """
    server_info = await server.info()
    check_server(server_info)
    info = await asyncio.to_thread(engine_info, options, server_info)
    served_draft = await ServedDraft.open(server, server_info, options.note)
    collector = Collector(options.socket, max_bytes=options.max_captured_bytes or running_bytes(info.num_slots))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(collector.listening())
        with suppress(TimeoutError):
            async with asyncio.timeout(options.hello_s):
                await collector.greeted.wait()
        hello = collector.hello
        reported = LoadedDraft() if hello is None else LoadedDraft(version=hello.version, tensors_digest=hello.digest)
        await served_draft.adopt(reported, options.drafts)
        engine = SglangEngine(server, served_draft, collector, info, server_info, options)
        await stack.enter_async_context(engine.running(on_finished, has_ended, restart))
        yield engine


def check_server(server_info: ServerInfo) -> None:
    """Raises InvalidInput with the arguments to change if this server is unsuitable."""
    if not versions.is_tested(server_info.version):
        extra = {"version": server_info.version}
        logger.warning(
            "This release of SGLang is untested; checksums prove each swap, and the plugin checks its hooks",
            extra=extra,
        )
    requirements = [
        (
            server_info.algorithm == "EAGLE3",
            f"--speculative-algorithm EAGLE3 (it has {server_info.algorithm or 'none'})",
        ),
        (server_info.num_branches == 1, "--speculative-eagle-topk 1: Updraft supports chains, not trees"),
        (
            LOADER in server_info.weight_loaders,
            f"--custom-weight-loader {LOADER}, with the plugin's folder on its PYTHONPATH",
        ),
        (
            server_info.dp_size == 1,
            "--dp-size 1: SGLang updates the weights of one replica only; run one pod per replica",
        ),
    ]
    missing = [argument for is_met, argument in requirements if not is_met]
    if missing:
        raise InvalidInput(f"start the SGLang server with {'; and with '.join(missing)}")


def engine_info(options: SglangOptions, server_info: ServerInfo) -> EngineInfo:
    """Identity of the local model folder. Raises InvalidInput if the server serves another model, or the context is too
    long."""
    config = describe(options.model)
    if options.max_context is not None and options.max_context > config.max_position:
        raise InvalidInput(
            f"a context of {options.max_context} exceeds the model's {config.max_position} positions;"
            " set UPDRAFT_INFERENCE_MAX_CONTEXT to at most that"
        )
    fingerprint = target_fingerprint(options.model)
    served = Path(server_info.model_path)
    if served.resolve() != options.model.resolve():
        if not served.is_dir():
            raise InvalidInput(
                f"the SGLang server serves {server_info.model_path}, which is not visible here;"
                f" start it with --model-path {options.model.resolve()}"
            )
        if target_fingerprint(served) != fingerprint:
            raise InvalidInput(
                f"the SGLang server serves {server_info.model_path}, which is not the same model as {options.model}"
            )
    limit = min(options.max_context or config.max_position, config.max_position, server_info.max_context)
    return EngineInfo(
        engine=f"sglang/{server_info.version}",
        target_fingerprint=fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(options.model),
        max_context=limit,
        num_slots=server_info.num_slots,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
    )
