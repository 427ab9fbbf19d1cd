"""The Fleet service: one stream a pod, reports in, directives out."""
# ruff: noqa: N802 - gRPC names the method

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from updraft.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from updraft_chassis.errors import UpdraftError
from updraft_registry.control import Control
from updraft_registry.fleet import Session

Context = grpc.aio.ServicerContext[Any, Any]


class FleetServicer(fleet_pb2_grpc.FleetServicer):
    """See fleet.proto.

    Written with `context.write`: a generator could not wait for reports and directives at once.
    """

    def __init__(self, control: Control) -> None:
        self._control = control

    async def Connect(  # type: ignore[override] # the generated base knows generators only; grpc.aio takes coroutines too
        self, request_iterator: AsyncIterator[fleet_pb2.ConnectRequest], context: Context
    ) -> None:
        """Serve one pod until its stream ends, or another stream of the same pod takes over."""
        session = Session()
        try:
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(self._read(session, request_iterator))
                async for directive in session.directives():
                    await context.write(fleet_pb2.ConnectResponse(directive=directive))
                reading.cancel()
        finally:
            self._control.disconnect(session)
        session.check()

    async def _read(self, session: Session, reports: AsyncIterator[fleet_pb2.ConnectRequest]) -> None:
        try:
            async for request in reports:
                self._control.report(session, request.report)
        except UpdraftError as error:
            session.close(error)
        else:
            session.close()
