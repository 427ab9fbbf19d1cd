"""From the engine's thread to the event loop: every ended request is told once to all who count or keep it.

The engine knows nothing of stop strings: such a request looks cancelled to it, and gets its true reason here.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

from updraft_inference.agent.selection import CapturePlan
from updraft_inference.engine import FinishedRequest, FinishReason

Listener = Callable[[FinishedRequest, CapturePlan], None]

_ENGINE_ANSWERS_S = 5.0
"""A cancelled request ends at the next step; nothing waits longer than this for its statistics."""


class PendingCompletion:
    """The end of one request, before and after it came."""

    def __init__(self, plan: CapturePlan) -> None:
        self.plan = plan
        self._is_stopped = False
        self._finished: asyncio.Future[FinishedRequest] = asyncio.get_running_loop().create_future()

    def stop(self) -> None:
        """A stop string was found: what the engine calls cancelled ended as it should."""
        self._is_stopped = True

    async def finished(self) -> FinishedRequest | None:
        """What the engine says of it; None if it does not answer in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ENGINE_ANSWERS_S):
                return await asyncio.shield(self._finished)
        return None

    def resolve(self, finished: FinishedRequest) -> FinishedRequest:
        """The engine ended it: the record with its true reason."""
        if self._is_stopped and finished.reason is FinishReason.CANCELLED:
            finished = replace(finished, reason=FinishReason.STOP)
        if not self._finished.done():
            self._finished.set_result(finished)
        return finished


class CompletionListeners:
    """Expected ends by request id. `sink` is for the engine's thread, everything else for the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._listeners: list[Listener] = []
        self._expected: dict[str, PendingCompletion] = {}

    def subscribe(self, *listeners: Listener) -> None:
        """Call these, in order, for every request that ends from now on."""
        self._listeners += listeners

    @property
    def expected(self) -> Iterable[str]:
        """Ids of the requests that have not ended."""
        return self._expected.keys()

    def expect(self, request_id: str, plan: CapturePlan) -> PendingCompletion:
        """Announce a request before the engine gets it."""
        completion = self._expected[request_id] = PendingCompletion(plan)
        return completion

    def forget(self, request_id: str) -> None:
        """The engine refused it: no end will come."""
        self._expected.pop(request_id, None)

    def sink(self, finished: FinishedRequest) -> None:
        """The engine's FinishedSink."""
        with suppress(RuntimeError):  # the loop is closed: the process is ending, and nobody counts any more
            self._loop.call_soon_threadsafe(self._deliver, finished)

    def _deliver(self, finished: FinishedRequest) -> None:
        completion = self._expected.pop(finished.request.request_id, None)
        if completion is None:
            return
        finished = completion.resolve(finished)
        for listener in self._listeners:
            listener(finished, completion.plan)
