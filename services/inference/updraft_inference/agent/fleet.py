"""The pod's one stream to the registry: whole reports up, whole directives down, for as long as the process
lives.

A lost stream costs time, not truth: the next one begins with a whole report and is answered with a whole
directive. Serving neither waits for the registry at the start nor notices when it goes.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from updraft.fleet.v1 import fleet_pb2
from updraft_chassis import rpc
from updraft_chassis.errors import UpdraftError
from updraft_chassis.retry import Backoff
from updraft_inference.race import raise_if_cancelled

if TYPE_CHECKING:  # the stub file knows this name, the generated code does not
    from updraft.fleet.v1.fleet_pb2_grpc import FleetAsyncStub

logger = logging.getLogger(__name__)


class FleetLink:
    """Keeps the stream. `report` gives the pod's state each time it is sent, `on_directive` gets each answer.

    `changed` is set by whoever changes what the registry waits for: it is reported at once.
    """

    def __init__(
        self,
        stub: "FleetAsyncStub",
        report: Callable[[], fleet_pb2.PodReport],
        on_directive: Callable[[fleet_pb2.Directive], None],
        *,
        changed: asyncio.Event,
        on_connected: Callable[[int], None],
        report_s: float,
    ) -> None:
        self._stub = stub
        self._report = report
        self._on_directive = on_directive
        self._on_connected = on_connected
        self._report_s = report_s
        self._backoff = Backoff(cap_s=5.0)
        self._changed = changed
        self._is_known_away = False

    async def run(self) -> None:
        """Stay connected, for ever."""
        for delay_s in self._backoff:
            try:
                with rpc.errors():
                    await self._converse()
                self._note_away("the registry closed the stream")
            except UpdraftError as error:
                raise_if_cancelled()
                self._note_away(str(error))
            finally:
                self._on_connected(0)
            await asyncio.sleep(delay_s)

    async def _converse(self) -> None:
        call = self._stub.Connect(self._reports())
        try:
            async for response in call:
                self._note_connected()
                self._on_directive(response.directive)
        finally:
            call.cancel()

    async def _reports(self) -> AsyncIterator[fleet_pb2.ConnectRequest]:
        while True:
            self._changed.clear()
            yield fleet_pb2.ConnectRequest(report=self._report())
            with suppress(TimeoutError):
                async with asyncio.timeout(self._report_s):
                    await self._changed.wait()

    def _note_connected(self) -> None:
        if self._is_known_away:
            logger.info("The registry is back")
        self._is_known_away = False
        self._backoff.reset()
        self._on_connected(1)

    def _note_away(self, reason: str) -> None:
        if not self._is_known_away:
            logger.warning("The registry is away; serving goes on", extra={"reason": reason})
        self._is_known_away = True
