"""The engine port over a stock SGLang server that runs already.

Tokens come over HTTP, steps and hidden states over the plugin's socket, and the server's own sums and hashes have the last
word on both. What SGLang fixes for all requests (who drafts, how many) is refused when a request asks for something else.
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
from typing import Any, TypeVar

from updraft_artifacts.model_folder import target_fingerprint, tokenizer_fingerprint
from updraft_chassis.errors import InvalidInput, Unavailable, UpdraftError
from updraft_draft.config import TargetConfig
from updraft_inference.engine import (
    CaptureLoss,
    Delta,
    DraftCheckpoint,
    EngineInfo,
    EngineLoad,
    FinishedSink,
    GenerationRequest,
    LoadedDraft,
    SwapResult,
)
from updraft_inference.sglang_engine import request as requests
from updraft_inference.sglang_engine import versions
from updraft_inference.sglang_engine.collector import Collector
from updraft_inference.sglang_engine.draft_fingerprint import OtherVocabularyError
from updraft_inference.sglang_engine.draft_swap import LOADER, ServedDraft
from updraft_inference.sglang_engine.request_session import RequestSession
from updraft_inference.sglang_engine.server import ServerInfo, SglangServer

logger = logging.getLogger(__name__)

T = TypeVar("T")

Restart = Callable[[Path], Awaitable[None]]
"""Ends the server and starts it with the draft in this folder; returns once it is up."""

_PROBE_TIMEOUT_S = 5.0
_MAX_SILENT_PROBES = 3
_RETRY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangOptions:
    """How to serve with a server. `max_context`: a limit below the server's own; None: that one."""

    model: Path
    socket: Path
    note: Path
    """Exists during a swap; see `served_draft`."""
    drafts: Path | None = None
    """Where versions lie, to recognise what a server holds already."""
    max_context: int | None = None
    max_queued: int = 256
    max_captured_bytes: int = 1 << 30
    """Memory of the rows of running requests."""
    hello_s: float = 10.0
    """How long a start waits for the plugin, to learn which draft the server holds. It connects in the server's own start."""
    probe_s: float = 2.0
    """How often to see whether the server answers."""


class SglangEngine:
    """Made by `opened`."""

    def __init__(
        self, server: SglangServer, served_draft: ServedDraft, collector: Collector, info: EngineInfo, said: ServerInfo
    ) -> None:
        self._server = server
        self._served_draft = served_draft
        self._collector = collector
        self._info = info
        self._drafts = requests.Speculation(num_steps=said.num_steps, is_adaptive=said.is_adaptive)
        self._sessions: dict[str, RequestSession] = {}
        self._swap_lock = asyncio.Lock()
        self._is_gone = False
        self._is_restarting = False
        self._restart: Restart | None = None
        self._failed_starts: Counter[str] = Counter()
        """By digest of the draft."""
        self._note = Path()
        self._max_queued = 0
        self._on_finished: FinishedSink = lambda _: None
        self._tasks = asyncio.TaskGroup()

    @property
    def info(self) -> EngineInfo:
        """Identity and limits."""
        return self._info

    @property
    def loaded(self) -> LoadedDraft:
        """The draft in use, by the server's own hashes."""
        return self._served_draft.loaded

    @property
    def load(self) -> EngineLoad:
        """How busy it is, by what went through here."""
        num = len(self._sessions)
        return EngineLoad(
            running=min(num, self._info.num_slots),
            queued=max(0, num - self._info.num_slots),
            used_tokens=sum(session.num_tokens for session in self._sessions.values()),
            lookahead=self._collector.last_lookahead,
        )

    @property
    def lookahead_estimates(self) -> None:
        """SGLang chooses, and does not say by what."""
        return None

    @property
    def faults(self) -> Mapping[int, int]:
        """SGLang does not draft in a way that could fail on its own."""
        return {}

    @property
    def capture_problem(self) -> str:
        """See the port."""
        return self._collector.problem

    @property
    def capture_losses(self) -> Mapping[CaptureLoss, int]:
        """See the port."""
        return self._collector.losses

    @property
    def is_alive(self) -> bool:
        """The server answers."""
        return not self._is_gone

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """See the port."""
        requests.check(request, self._info, self._drafts)
        requests.check_sampling(request, self._info)
        if self._is_gone:
            raise Unavailable("the SGLang server has gone")
        if self._is_restarting:
            raise Unavailable("the SGLang server starts anew with another draft", retry_after_s=_RETRY_S)
        requests.check_room(len(self._sessions), self._info, self._max_queued)
        if request.request_id in self._sessions:
            raise InvalidInput(f"a request {request.request_id} is running")
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
        """See the port. One swap at a time, to its end also when the caller is cancelled."""
        async with self._swap_lock:
            return await self._to_its_end(self._swap(draft))

    async def rehash(self) -> LoadedDraft:
        """See the port."""
        async with self._swap_lock:
            return await self._served_draft.rehash()

    async def _swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        try:
            return await self._served_draft.swap(draft)
        except OtherVocabularyError:
            if self._restart is None or draft is None:
                raise
            return await self._start_anew(self._restart, draft)

    async def _start_anew(self, restart: Restart, draft: DraftCheckpoint) -> SwapResult:
        """For a draft with another vocabulary: take no new requests, let the server end those that run, start it with it.

        InvalidInput if the server does not start with it for the second time, and does with the draft before; else Unavailable.
        """
        started_s = time.monotonic()
        before, served = self._served_draft.start_folder, self._served_draft.good
        self._is_restarting = True
        try:
            try:
                await restart(draft.folder)
            except UpdraftError as error:
                logger.error("SGLang does not start with another draft", extra={"reason": str(error)})
                await restart(before)  # which fails too if we are told to stop
                await self._serve_anew(served)
                self._failed_starts[draft.tensors_digest] += 1
                is_second = self._failed_starts[draft.tensors_digest] > 1
                sentence = f"the SGLang server does not start with version {draft.version}: {error}"
                raise (InvalidInput if is_second else Unavailable)(sentence) from error
            await self._serve_anew(draft)
        finally:
            self._is_restarting = False
        return SwapResult(loaded=self.loaded, pause_s=time.monotonic() - started_s)

    async def _serve_anew(self, draft: DraftCheckpoint | None) -> None:
        """After the server's start."""
        self._served_draft = await ServedDraft.open(self._server, await self._server.info(), self._note)
        await self._served_draft.swap(draft)

    async def _run_session(self, session: RequestSession) -> None:
        """A request's whole session; what it raises is its reader's."""
        builder = self._collector.expect(session.rid, len(session.request.prompt_ids), session.request.capture)
        try:
            await session.run(self._server, self._drafts.num_steps)
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
        """Do it in a task of the engine's: whoever waits for it may be cancelled, it may not."""
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

    async def _watch(self, has_ended: Callable[[], bool], probe_s: float) -> None:
        """Notice that the server has gone. A pause is no reason, nor is a busy server: any answer will do."""
        silent = 0
        while not self._is_gone:
            await asyncio.sleep(probe_s)
            responds = await self._server.responds(_PROBE_TIMEOUT_S)
            if responds or self._is_restarting:  # which may have begun while it was asked
                silent = 0
                continue
            silent += 1
            self._is_gone = silent >= _MAX_SILENT_PROBES or has_ended()
        logger.critical("The SGLang server has gone", extra={"url": self._server.url})
        for session in self._sessions.values():
            session.deltas.put_nowait(Unavailable("the SGLang server has gone"))

    @asynccontextmanager
    async def running(
        self,
        options: SglangOptions,
        on_finished: FinishedSink,
        has_ended: Callable[[], bool],
        restart: Restart | None,
    ) -> AsyncIterator[None]:
        """Watch the server for the length of the block; then cancel what runs."""
        self._max_queued, self._on_finished = options.max_queued, on_finished
        self._restart, self._note = restart, options.note
        async with self._tasks:
            watch = self._tasks.create_task(self._watch(has_ended, options.probe_s))
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
    """An engine over a server that is up, for the length of the block. InvalidInput if it cannot be served with.

    `has_ended`: whoever started the server knows that it is over, and can `restart` it.
    """
    said = await server.info()
    check_server(said)
    info = await asyncio.to_thread(engine_info, options, said)
    served_draft = await ServedDraft.open(server, said, options.note)
    collector = Collector(options.socket, max_bytes=options.max_captured_bytes)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(collector.listening())
        with suppress(TimeoutError):
            async with asyncio.timeout(options.hello_s):
                await collector.greeted.wait()
        hello = collector.hello
        reported = LoadedDraft() if hello is None else LoadedDraft(version=hello.version, tensors_digest=hello.digest)
        await served_draft.adopt(reported, options.drafts)
        engine = SglangEngine(server, served_draft, collector, info, said)
        await stack.enter_async_context(engine.running(options, on_finished, has_ended, restart))
        yield engine


def check_server(said: ServerInfo) -> None:
    """InvalidInput, with what to change, if this server cannot be served with."""
    support = versions.support(said.version)
    if not support.is_tested:
        extra = {"version": said.version}
        logger.warning(
            "This release of SGLang was not tested; swaps are proved and the plugin checks itself", extra=extra
        )
    wishes = [
        (said.algorithm == "EAGLE3", f"--speculative-algorithm EAGLE3 (it has {said.algorithm or 'none'})"),
        (said.num_branches == 1, "--speculative-eagle-topk 1: Updraft learns from chains, not trees"),
        (LOADER in said.weight_loaders, f"--custom-weight-loader {LOADER}, and the plugin's folder on its PYTHONPATH"),
        (said.dp_size == 1, "--dp-size 1: SGLang updates weights of one replica only; run a pod for each"),
    ]
    missing = [wish for is_met, wish in wishes if not is_met]
    if missing:
        raise InvalidInput(f"start the SGLang server with {'; and with '.join(missing)}")


def engine_info(options: SglangOptions, said: ServerInfo) -> EngineInfo:
    """Identity, of the local model folder. InvalidInput if the server serves another one, or the model knows too little."""
    config = TargetConfig.from_folder(options.model)
    if options.max_context is not None and options.max_context > config.max_position:
        raise InvalidInput(
            f"a context of {options.max_context} exceeds the model's {config.max_position} positions;"
            " set UPDRAFT_INFERENCE_MAX_CONTEXT to at most that"
        )
    fingerprint = target_fingerprint(options.model)
    served = Path(said.model_path)
    if served.resolve() != options.model.resolve():
        if not served.is_dir():
            raise InvalidInput(
                f"the SGLang server serves {said.model_path}, which is not to be seen from here;"
                f" start it with --model-path {options.model.resolve()}"
            )
        if target_fingerprint(served) != fingerprint:
            raise InvalidInput(
                f"the SGLang server serves {said.model_path}, which is another model than {options.model}"
            )
    limit = min(options.max_context or config.max_position, config.max_position, said.max_context)
    return EngineInfo(
        engine=f"sglang/{said.version}",
        target_fingerprint=fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(options.model),
        max_context=limit,
        num_slots=said.num_slots,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
    )
