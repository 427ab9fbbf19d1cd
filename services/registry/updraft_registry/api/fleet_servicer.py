"""The Fleet service: one stream per pod, with reports in and directives out.

Misbehaving pods do not affect others. A pod that reports too often is read more slowly, so its own writes wait. A pod
that sends nothing, or does not read, is disconnected.
"""
# ruff: noqa: N802 - gRPC names the method

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

from updraft.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from updraft_chassis import rpc
from updraft_chassis.errors import Unavailable, UpdraftError
from updraft_registry.control import Control
from updraft_registry.fleet import Session
from updraft_registry.messages import reports
from updraft_registry.metrics import Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTimeouts:
    first_report_s: float = 30.0
    """A pod reports at once when it connects. `Fleet` handles later silence (`expiry_s`)."""
    write_s: float = 30.0
    """A directive is small, so a blocked write means that the pod is not reading."""
    burst: int = 40
    """Reports that may arrive at once. A swap takes about four."""
    interval_s: float = 0.05
    """Minimum average time between reports. A pod needs one every ten seconds."""


STREAM_TIMEOUTS = StreamTimeouts()

_UNBOUND = (
    "Pods of this speculator capture nothing of requests that have a tenant, because their token is not bound to it: write"
    " serve@SPECULATOR instead of serve in the file of tokens, or in UPDRAFT_REGISTRY_ACCOUNTS"
)


class FleetServicer(fleet_pb2_grpc.FleetServicer):
    """See fleet.proto.

    Written with `context.write`: a generator could not wait for reports and directives at once.
    """

    def __init__(self, control: Control, metrics: Metrics, timeouts: StreamTimeouts = STREAM_TIMEOUTS) -> None:
        self._control = control
        self._metrics = metrics
        self._timeouts = timeouts
        self._unbound: set[str] = set()
        """Speculators for which the log says that their pods are not bound."""

    async def Connect(  # type: ignore[override] # the generated base knows generators only; grpc.aio takes coroutines too
        self, request_iterator: AsyncIterator[fleet_pb2.ConnectRequest], context: rpc.Context
    ) -> None:
        """Serve one pod until its stream ends, or another stream of the same pod takes over."""
        call = rpc.current_call()
        session = Session(call.caller)
        with self._metrics.streams.track_inprogress():
            try:
                async with asyncio.TaskGroup() as tasks:
                    reading = tasks.create_task(self._read(session, request_iterator))
                    async for directive in session.directives():
                        await self._write(session, context, directive)
                    reading.cancel()
            finally:
                if not call.has_expired:  # else the pod stays connected: it calls again at once, or expires
                    self._control.disconnect(session)
        try:
            session.check()
        except UpdraftError as error:
            self._metrics.ended_streams.labels(error.status).inc()
            raise

    async def _read(self, session: Session, requests: AsyncIterator[fleet_pb2.ConnectRequest]) -> None:
        throttle = Throttle(burst=self._timeouts.burst, interval_s=self._timeouts.interval_s)
        first_report_s = self._timeouts.first_report_s
        try:
            async with rpc.unavailable_after(first_report_s, f"no report for {first_report_s:g} s"):
                request = await anext(requests, None)
            while request is not None:
                report = reports.read(request.report)
                self._control.report(session, report)
                if not session.may_hash_tenants:
                    self._warn(report.speculator)
                await asyncio.sleep(throttle.wait_s(asyncio.get_running_loop().time()))
                request = await anext(requests, None)
        except UpdraftError as error:
            session.close(error)
        else:
            session.close()

    def _warn(self, speculator: str) -> None:
        """Once each, because a large fleet reconnects often."""
        if speculator not in self._unbound:
            self._unbound.add(speculator)
            logger.warning(_UNBOUND, extra={"speculator": speculator})

    async def _write(self, session: Session, context: rpc.Context, directive: fleet_pb2.Directive) -> None:
        within_s = self._timeouts.write_s
        try:
            async with asyncio.timeout(within_s):
                await context.write(fleet_pb2.ConnectResponse(directive=directive))
        except TimeoutError:
            session.close(Unavailable(f"no directive was read for {within_s:g} s"))


class Throttle:
    """Spaces events evenly, after a burst that passes at once."""

    def __init__(self, *, burst: int, interval_s: float) -> None:
        self._slack_s = burst * interval_s
        self._interval_s = interval_s
        self._due_s = 0.0

    def wait_s(self, now_s: float) -> float:
        """Seconds to wait before the next event; 0 within a burst."""
        self._due_s = max(self._due_s, now_s - self._slack_s) + self._interval_s
        return max(0.0, self._due_s - now_s)
