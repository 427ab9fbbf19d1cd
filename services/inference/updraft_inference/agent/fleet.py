"""The pod's one stream to the registry: whole reports up, whole directives down, for as long as the process
lives.

A lost stream costs time, not truth: the next one begins with a whole report and is answered with a whole
directive. Serving goes on whether the registry is away or refuses the pod; the second is for a person to mend, and said so.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING

from updraft.fleet.v1 import fleet_pb2
from updraft_chassis import rpc
from updraft_chassis.errors import Forbidden, InvalidInput, Unauthenticated, UpdraftError
from updraft_chassis.retry import Backoff
from updraft_inference.cancellation import raise_if_cancelled, run_unless_cancelled_by

if TYPE_CHECKING:  # the stub files know these names, the code does not
    from grpc.aio import StreamStreamCall

    from updraft.fleet.v1.fleet_pb2_grpc import FleetAsyncStub

    Call = StreamStreamCall[fleet_pb2.ConnectRequest, fleet_pb2.ConnectResponse]

logger = logging.getLogger(__name__)


class LinkState(StrEnum):
    """How the stream is."""

    UP = "up"
    AWAY = "away"
    DENIED = "denied"
    """The registry is there, and the pod's token, its role or what it serves does not do."""


class FleetLink:
    """Keeps the stream. `report` gives the pod's state each time it is sent, `on_directive` gets each answer.

    `changed` is set by whoever changes what the registry waits for: it is reported at once. `on_link` hears of every
    directive (UP) and of every end of a stream.
    """

    def __init__(
        self,
        stub: "FleetAsyncStub",
        report: Callable[[], fleet_pb2.PodReport],
        on_directive: Callable[[fleet_pb2.Directive], None],
        *,
        changed: asyncio.Event,
        on_link: Callable[[LinkState], None],
        report_s: float,
    ) -> None:
        self._stub = stub
        self._report = report
        self._on_directive = on_directive
        self._on_link = on_link
        self._report_s = report_s
        self._changed = changed
        self._backoffs = {LinkState.AWAY: Backoff(cap_s=5.0), LinkState.DENIED: Backoff(initial_s=1.0, cap_s=60.0)}
        self._told = (LinkState.UP, "")
        self._is_broken_off = False
        """The last stream broke off, and why is not known: a registry that refused it says so again to the next one."""

    async def run(self) -> None:
        """Stay connected, for ever."""
        while True:
            is_known = True
            try:
                with rpc.errors():
                    await self._converse()
                link, reason = LinkState.AWAY, "the registry closed the stream"
            except (Unauthenticated, Forbidden, InvalidInput) as error:
                link, reason = LinkState.DENIED, str(error)
            except UpdraftError as error:
                raise_if_cancelled()
                link, reason = LinkState.AWAY, str(error)
                is_known = not isinstance(error, rpc.StatusLost) or self._is_broken_off
            self._is_broken_off = not is_known
            if is_known:
                self._note(link, reason)
            await asyncio.sleep(next(self._backoffs[link]))

    async def _converse(self) -> None:
        call = self._stub.Connect()
        try:
            await run_unless_cancelled_by(self._send(call), self._receive(call))
        finally:
            call.cancel()

    async def _receive(self, call: "Call") -> None:
        async for response in call:
            self._note_connected()
            self._on_directive(response.directive)

    async def _send(self, call: "Call") -> None:
        """Report until this is cancelled. In a task of ours: grpc's own, for an iterator of requests, waits for ever in a call
        that failed before it began, and `call.cancel()` does not reach it."""
        while True:
            self._changed.clear()
            try:
                await call.write(fleet_pb2.ConnectRequest(report=self._report()))
            except asyncio.InvalidStateError:  # it is over, and who receives hears why
                await asyncio.Event().wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._report_s):
                    await self._changed.wait()

    def _note_connected(self) -> None:
        if self._told[0] is not LinkState.UP:
            logger.info("The registry is back")
        self._told = (LinkState.UP, "")
        for backoff in self._backoffs.values():
            backoff.reset()
        self._on_link(LinkState.UP)

    def _note(self, link: LinkState, reason: str) -> None:
        """Tell once, until it is another trouble. One who is away is so in many words."""
        self._on_link(link)
        trouble = (link, reason if link is LinkState.DENIED else "")
        if trouble == self._told:
            return
        self._told = trouble
        if link is LinkState.DENIED:
            logger.error("The registry refuses this pod; serving goes on", extra={"reason": reason})
        else:
            logger.warning("The registry is away; serving goes on", extra={"reason": reason})
