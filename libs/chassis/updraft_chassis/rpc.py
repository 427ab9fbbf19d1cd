"""gRPC at both edges: limits and keepalive chosen on purpose, and one error tree on either side of the wire.

Servicers raise `UpdraftError`s; `ErrorsToStatus` turns them into statuses, `errors()` turns them back at the client.
The text of an unknown exception stays in the process's log; the caller hears INTERNAL.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, NoReturn

import grpc
import grpc.aio

from updraft_chassis.errors import (
    Conflict,
    Corrupt,
    Exhausted,
    InvalidInput,
    NotFound,
    Unavailable,
    UpdraftError,
)

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""gRPC's own default, stated: a message is metadata or one chunk; weights never travel in one message."""

CHUNK_BYTES = 1024 * 1024
"""Large enough that per-message cost is nothing, small enough to keep a slow link's other streams alive."""

_RETRY_AFTER = "updraft-retry-after-s"

# Characters. Details travel in HTTP/2 trailers, where one takes up to 12 bytes (UTF-8, percent-encoded) and peers
# refuse more than 8 KiB: a longer text would lose the status.
_MAX_DETAILS = 600

_MESSAGE_LIMITS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]

_CLIENT_OPTIONS = [
    *_MESSAGE_LIMITS,
    # Notice a silent peer (node lost, NAT entry expired) within 30 s; most NATs forget after 60 s or more.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Only while a call is open: the fleet stream always is one, and an idle CLI needs no pings.
    ("grpc.keepalive_permit_without_calls", 0),
    # gRPC would back off to 2 minutes; a restarted registry must see its pods again within seconds.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]

_SERVER_OPTIONS = [
    *_MESSAGE_LIMITS,
    # Two servers sharing one port (gRPC's default on Linux) would split the fleet.
    ("grpc.so_reuseport", 0),
    # Accept the clients' pings every 20 s, with slack; the default of 5 minutes hangs up on them.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The fleet view is only as true as its streams: notice a pod that vanished without FIN within 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]

# Every pod holds one stream for good; beyond this a call is refused (RESOURCE_EXHAUSTED), not queued unseen.
_MAX_CONCURRENT_RPCS = 10_000

_BY_STATUS: dict[grpc.StatusCode, type[UpdraftError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: Conflict,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInput,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,  # by the peer; our own cancellation is CancelledError
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
    grpc.StatusCode.DATA_LOSS: Corrupt,
}


def server() -> grpc.aio.Server:
    """Return a server with our limits and `ErrorsToStatus`; add servicers, `bind`, then `start()`."""
    return grpc.aio.server(
        interceptors=[ErrorsToStatus()], options=_SERVER_OPTIONS, maximum_concurrent_rpcs=_MAX_CONCURRENT_RPCS
    )


def bind(server: grpc.aio.Server, *, host: str, port: int, setting: str) -> int:
    """Listen; return the port (a free one for 0). Conflict names `setting` when it cannot be had."""
    try:
        return server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise Conflict(f"port {port} on {host} is taken or not allowed; set {setting}") from error


def channel(address: str) -> grpc.aio.Channel:
    """Return a channel to `host:port`; it connects when first used, and again by itself."""
    return grpc.aio.insecure_channel(address, options=_CLIENT_OPTIONS)


@contextmanager
def errors() -> Iterator[None]:
    """Around client calls: a failed call raises the error of our tree that the server raised."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        kind = _BY_STATUS.get(error.code(), UpdraftError)
        message = error.details() or error.code().name
        if kind is Unavailable:
            raise Unavailable(message, _retry_after_s(error)) from error
        raise kind(message) from error


def _retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    for name, value in error.trailing_metadata() or ():
        if name == _RETRY_AFTER:
            return float(value)
    return None


class ErrorsToStatus(grpc.aio.ServerInterceptor):
    """Maps what a servicer raises to a gRPC status, for all four kinds of method."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler; an unknown method stays gRPC's own UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        asked = "stream" if handler.request_streaming else "unary"
        answered = "stream" if handler.response_streaming else "unary"
        behaviour = getattr(handler, f"{asked}_{answered}")
        method = str(handler_call_details.method)
        if inspect.isasyncgenfunction(behaviour):
            wrapped: Callable[[Any, Any], Any] = _iterating(behaviour, method)
        else:
            wrapped = _awaiting(behaviour, method, drains=not handler.response_streaming)
        return getattr(grpc, f"{asked}_{answered}_rpc_method_handler")(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _awaiting(
    behaviour: Callable[[Any, Any], Awaitable[Any]], method: str, *, drains: bool
) -> Callable[[Any, Any], Awaitable[Any]]:
    """For one answer, or (without `drains`) a handler that writes its stream of answers itself.

    A peer of the latter reads while it writes, and may never end its side: it must hear the status at once.
    """

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            response = await behaviour(request, context)
        except Exception as error:  # noqa: BLE001 - border: everything becomes a status
            if drains:
                await _drain(request)
            await _abort(context, error, method)
        if drains:
            await _drain(request)
        return response

    return call


DRAIN_S = 30.0
"""A sender that is refused may finish what it has in flight, but neither stay silent nor send for ever."""


async def _drain(request: Any) -> None:
    """Take the rest of a request stream: a grpc.aio client that is still writing loses what it is told (grpc#36066)."""
    if isinstance(request, AsyncIterable):
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                async for _ in request:
                    pass


def _iterating(
    behaviour: Callable[[Any, Any], AsyncGenerator[Any, None]], method: str
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async with aclosing(behaviour(request, context)) as responses:  # its `finally` runs with the call's end
                async for response in responses:
                    yield response
        except Exception as error:  # noqa: BLE001 - border: everything becomes a status
            await _abort(context, error, method)

    return call


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):  # the servicer chose its own status
        raise error
    if not isinstance(error, UpdraftError):
        logger.error("Call failed", exc_info=error, extra={"method": method})
        await context.abort(grpc.StatusCode.INTERNAL, f"{method} failed; the server's log says why")
    wait_s = getattr(error, "retry_after_s", None)
    trailers = () if wait_s is None else ((_RETRY_AFTER, f"{wait_s:g}"),)
    await context.abort(grpc.StatusCode[error.status], str(error)[:_MAX_DETAILS], trailers)
