"""Passes every finished request from the engine thread to the event loop, once to each listener.

The engine does not know stop strings. It reports a request that one ended as cancelled, and the true reason is set here.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

from updraft_inference.agent.selection import CapturePlan
from updraft_inference.engine import FinishedRequest, FinishReason

Listener = Callable[[FinishedRequest, CapturePlan], None]
PlanListener = Callable[[CapturePlan], None]

_ENGINE_ANSWERS_S = 5.0
"""A cancelled request ends at the next step; nothing waits longer than this for its statistics."""


class PendingCompletion:
    """A request that has not finished, or whose statistics are awaited."""

    def __init__(self, plan: CapturePlan) -> None:
        self.plan = plan
        self._is_stopped = False
        self._finished: asyncio.Future[FinishedRequest] = asyncio.get_running_loop().create_future()

    def stop(self) -> None:
        """A stop string was found, so the engine reports a cancellation that was a regular end."""
        self._is_stopped = True

    async def finished(self) -> FinishedRequest | None:
        """The record of the finished request; None if the engine does not report it in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ENGINE_ANSWERS_S):
                return await asyncio.shield(self._finished)
        return None

    def resolve(self, finished: FinishedRequest) -> FinishedRequest:
        """Take the record of the engine and return it with its true finish reason."""
        if self._is_stopped and finished.reason is FinishReason.CANCELLED:
            finished = replace(finished, reason=FinishReason.STOP)
        if not self._finished.done():
            self._finished.set_result(finished)
        return finished


class CompletionListeners:
    """Pending completions by request id. `sink` is called on the engine thread, everything else on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._listeners: list[Listener] = []
        self._start_listeners: list[PlanListener] = []
        self._failure_listeners: list[PlanListener] = []
        self._expected: dict[str, PendingCompletion] = {}

    def subscribe(self, *listeners: Listener) -> None:
        """Call these, in order, for every request that finishes from now on."""
        self._listeners += listeners

    def subscribe_to_starts(self, started: PlanListener, failed: PlanListener) -> None:
        """Call `started` for every request that the engine receives, and `failed` for one that it will not report."""
        self._start_listeners.append(started)
        self._failure_listeners.append(failed)

    @property
    def expected(self) -> Iterable[str]:
        return self._expected.keys()

    def expect(self, request_id: str, plan: CapturePlan) -> PendingCompletion:
        """Announce a request before the engine receives it."""
        for listener in self._start_listeners:
            listener(plan)
        completion = self._expected[request_id] = PendingCompletion(plan)
        return completion

    def forget(self, request_id: str) -> None:
        """The engine rejected the request, or failed, and will not report it. One that it has reported is nothing new."""
        if (completion := self._expected.pop(request_id, None)) is not None:
            for listener in self._failure_listeners:
                listener(completion.plan)

    def sink(self, finished: FinishedRequest) -> None:
        with suppress(RuntimeError):  # the event loop is closed because the process is ending
            self._loop.call_soon_threadsafe(self._notify, finished)

    def _notify(self, finished: FinishedRequest) -> None:
        completion = self._expected.pop(finished.request.request_id, None)
        if completion is None:
            return
        finished = completion.resolve(finished)
        for listener in self._listeners:
            listener(finished, completion.plan)
