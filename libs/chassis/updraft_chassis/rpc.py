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

from updraft_chassis.access import Access
from updraft_chassis.credentials import Credentials, ServerTls, TokenChannel
from updraft_chassis.errors import (
    Conflict,
    Corrupt,
    Exhausted,
    Forbidden,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
    UpdraftError,
)

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""gRPC's own default, stated: a message is metadata or one chunk; weights never travel in one message."""

CHUNK_BYTES = 1024 * 1024
"""Large enough that per-message cost is nothing, small enough to keep a slow link's other streams alive."""

_RETRY_AFTER = "updraft-retry-after-s"

_STRANGER_DRAIN_S = 1.0
"""Whoever may not call gets no more of our attention than it takes to hear so."""

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
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Despite its name, how long one attempt to connect may take, handshakes too: a busy machine or a far one needs time.
    ("grpc.min_reconnect_backoff_ms", 5_000),
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

# Every pod holds one stream for good, and one more while it fetches; beyond this a call is refused (RESOURCE_EXHAUSTED),
# not queued unseen.
_MAX_CONCURRENT_RPCS = 20_000

_BY_STATUS: dict[grpc.StatusCode, type[UpdraftError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: Conflict,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInput,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Forbidden,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,  # by the peer; our own cancellation is CancelledError
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
    grpc.StatusCode.DATA_LOSS: Corrupt,
}


def server(access: Access | None = None) -> grpc.aio.Server:
    """Return a server with our limits and `ErrorsToStatus`; add servicers, `bind`, then `start()`.

    Without `access` whoever connects may call everything.
    """
    interceptors: list[grpc.aio.ServerInterceptor] = [ErrorsToStatus()]  # the first one is the outermost
    return grpc.aio.server(
        interceptors=interceptors if access is None else [*interceptors, access],
        options=_SERVER_OPTIONS,
        maximum_concurrent_rpcs=_MAX_CONCURRENT_RPCS,
    )


def bind(server: grpc.aio.Server, *, host: str, port: int, setting: str, tls: ServerTls | None = None) -> int:
    """Listen; return the port (a free one for 0). Conflict names `setting` when it cannot be had.

    InvalidInput when the files of `tls` are not what they should be.
    """
    credentials = None if tls is None else tls.credentials()
    address = f"{host}:{port}"
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise Conflict(f"port {port} on {host} is taken or not allowed; set {setting}") from error


def channel(address: str, credentials: Credentials | None = None) -> grpc.aio.Channel:
    """Return a channel to `host:port`; it connects when first used, and again by itself.

    InvalidInput when the files of `credentials` are not what they should be.
    """
    credentials = credentials or Credentials()
    tls, token = credentials.tls(), credentials.token()
    if tls is None:
        opened = grpc.aio.insecure_channel(address, options=_CLIENT_OPTIONS)
    else:
        opened = grpc.aio.secure_channel(address, tls, options=_CLIENT_OPTIONS)
    return opened if token is None else TokenChannel(opened, token)


class BrokenOff(Unavailable):
    """A call ended while this side sent, and why is lost: the peer may be away, or may have refused it."""


def _is_broken_off(error: grpc.aio.AioRpcError) -> bool:
    """gRPC's client says INTERNAL where the connection broke while it sent (grpc#36066); no server said that."""
    return error.code() is grpc.StatusCode.INTERNAL and "execute_batch" in (error.details() or "")


@contextmanager
def errors() -> Iterator[None]:
    """Around client calls: a failed call raises the error of our tree that the server raised."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        kind = BrokenOff if _is_broken_off(error) else _BY_STATUS.get(error.code(), UpdraftError)
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

    def __init__(self, *, drain_s: float = 30.0) -> None:
        self._drain_s = drain_s
        """A sender that is refused may finish what it has in flight, but neither stay silent nor send for ever."""

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
            wrapped = _awaiting(behaviour, method, drain_s=None if handler.response_streaming else self._drain_s)
        return getattr(grpc, f"{asked}_{answered}_rpc_method_handler")(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _awaiting(
    behaviour: Callable[[Any, Any], Awaitable[Any]], method: str, *, drain_s: float | None
) -> Callable[[Any, Any], Awaitable[Any]]:
    """For one answer, or (without `drain_s`) a handler that writes its stream of answers itself.

    A peer of the latter reads while it writes, and may never end its side: it must hear the status at once.
    """

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            response = await behaviour(request, context)
        except Exception as error:  # noqa: BLE001 - border: everything becomes a status
            is_stranger = isinstance(error, Unauthenticated | Forbidden)
            await _drain(request, min(drain_s, _STRANGER_DRAIN_S) if is_stranger and drain_s else drain_s)
            await _abort(context, error, method)
        await _drain(request, drain_s)
        return response

    return call


async def _drain(request: Any, within_s: float | None) -> None:
    """Take the rest of a request stream: a grpc.aio client that is still writing loses what it is told (grpc#36066)."""
    if within_s is not None and isinstance(request, AsyncIterable):
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
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
