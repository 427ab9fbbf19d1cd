"""Runs one request at the server, from its start to its record.

It runs in its own task, so a slow reader delays nothing, and a reader who leaves does not lose the record.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from updraft_artifacts.sizing import PART_BYTES
from updraft_chassis.errors import Unavailable, UpdraftError
from updraft_inference.engine import Delta, FinishedRequest, FinishReason, GenerationRequest
from updraft_inference.sglang_engine import request as requests
from updraft_inference.sglang_engine.collector import Collector
from updraft_inference.sglang_engine.server import SglangServer, StreamEvent
from updraft_inference.sglang_engine.server_stats import ServerStats, uncaptured
from updraft_inference.tap.trace_builder import Assembly, TraceBuilder

logger = logging.getLogger(__name__)

COMPLETE_S = 1.0
"""How long a finished request waits for outstanding messages of the plugin."""

_ABORT_S = 5.0
"""How long the server may take to end an aborted request before we disconnect."""

_ABORT_AGAIN_S = 0.5
"""The server forgets the abort of a request that it has not scheduled yet."""


@dataclass(slots=True, kw_only=True)
class RequestSession:
    """A request in progress. `deltas` ends with a Delta that has `finished`, or with an error."""

    request: GenerationRequest
    rid: str
    """Its id at the server, never reused: two seconds after an answer SGLang aborts any request with that id, and an
    abort ends all requests whose ids start with it."""
    deltas: asyncio.Queue[Delta | UpdraftError] = field(default_factory=asyncio.Queue)
    output: list[int] = field(default_factory=list)
    is_cancelled: bool = False
    submitted_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    stats: ServerStats | None = None
    reason: FinishReason | None = None
    _limit: asyncio.Timeout | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.output)

    @property
    def is_over(self) -> bool:
        return self.reason is not None

    def cancel(self) -> None:
        """End it soon, because nobody reads it any more."""
        self.is_cancelled = True
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + _ABORT_S)

    async def run(self, server: SglangServer, lookahead: int, on_progress: Callable[[], None] = lambda: None) -> None:
        """Generate to the end or to the abort; `on_progress` is called after each event. Raises UpdraftError if the server
        rejects it or fails while somebody reads it; a request that nobody reads ends with what it has."""
        try:
            await self._generate(server, lookahead, on_progress)
        except UpdraftError:
            if not self.is_cancelled:
                raise
            self.reason = FinishReason.CANCELLED
        self._limit = None
        if not self.is_over and not self.is_cancelled:
            raise Unavailable("the SGLang server broke off the answer")

    async def _generate(self, server: SglangServer, lookahead: int, on_progress: Callable[[], None]) -> None:
        with suppress(TimeoutError):  # the abort was not answered: disconnect
            async with asyncio.timeout(None) as self._limit:
                if self.is_cancelled:
                    return
                async with server.generate(requests.body(self.request, self.rid)) as events:
                    async for event in events:
                        self._take(event, lookahead)
                        on_progress()

    def _take(self, event: StreamEvent, lookahead: int) -> None:
        tokens = event.new_ids(len(self.output))
        if tokens:
            self.first_token_s = self.first_token_s or time.monotonic()
            self.output += tokens
            self.deltas.put_nowait(Delta(token_ids=tokens))
        if event.finish is not None:
            self.reason = requests.reason(event.finish)
            try:
                self.stats = ServerStats.of(event.meta, lookahead)
            except (KeyError, TypeError, ValueError) as error:  # another release may have another format
                logger.warning("The totals of SGLang cannot be read; only captured steps are counted: %r", error)

    async def abort(self, server: SglangServer) -> None:
        """Tell the server, repeatedly, until it has ended the request."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + _ABORT_S
        while not self.is_over and loop.time() < end_s:
            try:
                await server.abort(self.rid)
            except UpdraftError as error:
                logger.warning("A request cannot be aborted", extra={"reason": str(error)})
                if self._limit is not None:
                    self._limit.reschedule(loop.time())
                return
            await asyncio.sleep(_ABORT_AGAIN_S)

    def part(self, builder: TraceBuilder) -> Callable[[], FinishedRequest] | None:
        """The rows that are captured and not handed over yet, if they are too many to wait for the end. The result
        puts it together, in any thread."""
        if builder.nbytes < PART_BYTES:
            return None
        before, now = builder.num_taken, time.monotonic()
        if (assembly := builder.take(len(self.output))) is None:
            return None
        part = FinishedRequest(
            request=self.request,
            output_ids=tuple(self.output[: assembly.num_output]),
            steps=(),
            reason=FinishReason.LENGTH,
            time_to_first_token_s=(self.first_token_s or now) - self.submitted_s,
            duration_s=now - self.submitted_s,
            num_handed_over=before,
            is_part=True,
        )
        return lambda: replace(part, steps=assembly.steps(), hidden=assembly.hidden())

    async def finished(self, collector: Collector, builder: TraceBuilder) -> FinishedRequest:
        ended_s = time.monotonic()
        first_s = self.first_token_s or ended_s
        num_output = len(self.output)
        await collector.complete(self.rid, num_output, COMPLETE_S)
        assembly = builder.assembly(num_output)
        finished = FinishedRequest(
            request=self.request,
            output_ids=tuple(self.output),
            steps=(),
            reason=FinishReason.CANCELLED if self.is_cancelled or self.reason is None else self.reason,
            time_to_first_token_s=first_s - self.submitted_s,
            duration_s=ended_s - self.submitted_s,
            num_handed_over=builder.num_taken,
        )
        return await asyncio.to_thread(_completed, finished, assembly, self.stats, decode_s=ended_s - first_s)


def _completed(
    finished: FinishedRequest, assembly: Assembly, stats: ServerStats | None, *, decode_s: float
) -> FinishedRequest:
    """The request with its steps, their sums and its hidden states, all of which take time if it is long."""
    steps, num_output = assembly.steps(), len(finished.output_ids)
    completed = replace(
        finished,
        steps=steps,
        hidden=assembly.hidden() if num_output else None,
        uncaptured=None if stats is None else uncaptured(stats, steps, num_output, decode_s),
    )
    _ = completed.step_sums
    return completed
