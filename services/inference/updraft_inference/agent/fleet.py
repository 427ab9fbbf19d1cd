"""The pod's stream to the registry: complete reports up, complete directives down, for the life of the process.

A lost stream loses no information, because the next one begins with a complete report and is answered with a complete
directive. Serving continues while the registry is away or refuses the pod. A refusal needs an operator and is logged as
an error.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING

from updraft.fleet.v1 import fleet_pb2
from updraft_chassis import rpc
from updraft_chassis.errors import Forbidden, InvalidInput, Unauthenticated, Unavailable, UpdraftError
from updraft_chassis.retry import Backoff
from updraft_inference.cancellation import raise_if_cancelled, run_unless_cancelled_by

if TYPE_CHECKING:  # the stub files know these names, the code does not
    from grpc.aio import StreamStreamCall

    from updraft.fleet.v1.fleet_pb2_grpc import FleetAsyncStub

    Call = StreamStreamCall[fleet_pb2.ConnectRequest, fleet_pb2.ConnectResponse]

logger = logging.getLogger(__name__)


class LinkState(StrEnum):
    UP = "up"
    AWAY = "away"
    DENIED = "denied"
    """The registry rejects the pod's token, role or target."""


class FleetLink:
    """Keeps the stream connected. `report` returns the state of the pod, `on_directive` receives each answer.

    Set `changed` to report a change immediately. `on_link` is called for every directive (UP) and for every end of a stream,
    unless its token has expired: then the next stream begins at once, with the new token.
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
        self._logged = (LinkState.UP, "")
        self._was_answered = False
        """Whether the last stream brought a directive."""
        self._is_broken_off = False
        """The last stream broke off for an unknown reason. A registry that refused it will refuse the next one too."""

    async def run(self) -> None:
        """Stay connected until cancelled."""
        while True:
            is_known = True
            try:
                with rpc.errors():
                    await self._exchange()
                link, reason = LinkState.AWAY, "the registry closed the stream"
            except (Unauthenticated, Forbidden, InvalidInput) as error:
                link, reason = LinkState.DENIED, str(error)
            except UpdraftError as error:
                raise_if_cancelled()
                if self._was_answered and _is_renewal(error):  # else a registry could make the pod call without pause
                    self._is_broken_off = False
                    continue
                link, reason = LinkState.AWAY, str(error)
                is_known = not isinstance(error, rpc.StatusLost) or self._is_broken_off
            self._is_broken_off = not is_known
            if is_known:
                self._note(link, reason)
            await asyncio.sleep(next(self._backoffs[link]))

    async def _exchange(self) -> None:
        call, self._was_answered = self._stub.Connect(), False
        try:
            await run_unless_cancelled_by(self._send(call), self._receive(call))
        finally:
            call.cancel()

    async def _receive(self, call: "Call") -> None:
        async for response in call:
            self._was_answered = True
            self._note_connected()
            self._on_directive(response.directive)

    async def _send(self, call: "Call") -> None:
        """Report until cancelled. In our own task, because grpc's task for an iterator of requests hangs in a call that
        failed before it started, and `call.cancel()` does not reach it."""
        while True:
            self._changed.clear()
            try:
                await call.write(fleet_pb2.ConnectRequest(report=self._report()))
            except asyncio.InvalidStateError:  # the call has ended; the receiver gets the reason
                await asyncio.Event().wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._report_s):
                    await self._changed.wait()

    def _note_connected(self) -> None:
        if self._logged[0] is not LinkState.UP:
            logger.info("The registry is back")
        self._logged = (LinkState.UP, "")
        for backoff in self._backoffs.values():
            backoff.reset()
        self._on_link(LinkState.UP)

    def _note(self, link: LinkState, reason: str) -> None:
        """Log a failure once. An unreachable registry has many error messages, so its reason is not compared."""
        self._on_link(link)
        failure = (link, reason if link is LinkState.DENIED else "")
        if failure == self._logged:
            return
        self._logged = failure
        if link is LinkState.DENIED:
            logger.error("The registry refuses this pod; serving goes on", extra={"reason": reason})
        else:
            logger.warning("The registry is away; serving goes on", extra={"reason": reason})


def _is_renewal(error: UpdraftError) -> bool:
    """Whether the registry asks for another stream at once."""
    return isinstance(error, Unavailable) and error.retry_after_s == 0
