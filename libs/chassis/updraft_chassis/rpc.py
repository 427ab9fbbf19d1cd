"""gRPC channels and servers: limits, keepalive, and the same error tree on both sides of the wire.

Servicers raise an `UpdraftError`, `ErrorsToStatus` turns it into a status, and `errors()` turns that back at the client.
Any other exception is logged, and the client gets INTERNAL without its text.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import grpc
import grpc.aio

from updraft_chassis.access import Access, Caller
from updraft_chassis.credentials import Credentials, ReloadingChannel, ServerTls, TokenChannel
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

Context = grpc.aio.ServicerContext[Any, Any]
Options = Sequence[tuple[str, int]]

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""gRPC's default, stated explicitly: a message is metadata or one chunk, never a whole weights file."""

CHUNK_BYTES = 1024 * 1024
"""Large enough to make the cost per message negligible, small enough to leave room for other streams on a slow link."""

_MAX_REQUEST_BYTES = 128 * 1024
"""A message of empty messages takes a hundred times its size in memory, so what is too large is refused unparsed."""

_LARGER_REQUESTS = {"/updraft.registry.v1.Registry/Publish": CHUNK_BYTES + _MAX_REQUEST_BYTES}

_RETRY_AFTER = "updraft-retry-after-s"

_DENIED_DRAIN_S = 1.0
"""Limits the effort spent on callers without a valid token or role."""

_FIRST_MESSAGE_S = 5.0

_EXPIRED = "the token of this call has expired; call again with a new one"
"""With status UNAVAILABLE and a retry after 0 s, so that a pod's next stream comes at once, with the new token of its file."""

_END = object()


@dataclass(slots=True)
class Call:
    """A call that is served here."""

    caller: Caller | None = None
    """None if the server has no `access`."""
    limit: asyncio.Timeout | None = None
    """Ends when the caller's token expires. A method that yields responses has one for each response."""

    @property
    def has_expired(self) -> bool:
        """Whether the method is interrupted because the caller's token has expired."""
        return self.limit is not None and self.limit.expired()


_CALL: ContextVar[Call] = ContextVar("call")
"""Without a default: a method that cannot tell its caller fails."""

# Characters. Details travel in HTTP/2 trailers, where a character takes up to 12 bytes (UTF-8, percent-encoded) and peers
# reject more than 8 KiB: a longer text would lose the status.
_MAX_DETAILS = 600

_MESSAGE_LIMITS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]

_CLIENT_OPTIONS = [
    *_MESSAGE_LIMITS,
    # Detect a silent peer (lost node, expired NAT entry) within 30 s; most NATs drop idle entries after 60 s or more.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Only while a call is open: a pod's fleet stream always is, and an idle CLI needs no pings.
    ("grpc.keepalive_permit_without_calls", 0),
    # gRPC would back off to 2 minutes; pods must reconnect to a restarted registry within seconds.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Despite its name this is the time limit for one connection attempt, handshakes included: a busy or distant peer is slow.
    ("grpc.min_reconnect_backoff_ms", 5_000),
]

_SERVER_OPTIONS = [
    *_MESSAGE_LIMITS,
    # Two servers sharing one port (gRPC's default on Linux) would split the fleet.
    ("grpc.so_reuseport", 0),
    # Accept the clients' pings every 20 s, with slack; the default of 5 minutes would close the connection.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The fleet view depends on its streams: detect a pod that vanished without FIN within 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]

# Every pod holds one stream permanently, and one more while it fetches. Beyond this limit calls fail with RESOURCE_EXHAUSTED
# instead of waiting in a hidden queue.
_MAX_CONCURRENT_RPCS = 20_000

_KINDS = (NotFound, Conflict, InvalidInput, Unauthenticated, Forbidden, Unavailable, Exhausted, Corrupt)

_BY_STATUS: dict[grpc.StatusCode, type[UpdraftError]] = {
    **{grpc.StatusCode[kind.status]: kind for kind in _KINDS},
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInput,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,  # cancelled by the peer; a local cancellation is CancelledError
}


def server(access: Access | None = None) -> grpc.aio.Server:
    """A server with our limits and `ErrorsToStatus`; add servicers, `bind`, then `start()`.

    Without `access` every client may call every method.
    """
    return grpc.aio.server(
        interceptors=[ErrorsToStatus(access)],
        options=_SERVER_OPTIONS,
        maximum_concurrent_rpcs=_MAX_CONCURRENT_RPCS,
    )


def bind(server: grpc.aio.Server, *, host: str, port: int, setting: str, tls: ServerTls | None = None) -> int:
    """Listen; return the port (port 0 selects a free one).

    Conflict, with the name of `setting`, if the port is not available; InvalidInput if a file of `tls` is not valid.
    """
    credentials = None if tls is None else tls.credentials()
    address = f"{host}:{port}"
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise Conflict(f"cannot listen on {address}: the port is in use or not permitted; set {setting}") from error


def current_call() -> Call:
    """The call whose method runs in this task. LookupError outside of methods."""
    return _CALL.get()


def channel(address: str, credentials: Credentials | None = None, options: Options = ()) -> grpc.aio.Channel:
    """A channel to `host:port` that connects on first use and reconnects by itself. `options` come after our own.

    InvalidInput if a file of `credentials` is not valid.
    """
    credentials = credentials or Credentials()
    tls, token = credentials.tls(), credentials.token()
    opened: grpc.aio.Channel
    if tls is None:
        opened = grpc.aio.insecure_channel(address, options=[*_CLIENT_OPTIONS, *options])
    else:
        opened = ReloadingChannel(tls, partial(_secure, address, credentials.server_name, options))
    return opened if token is None else TokenChannel(opened, token.get)


def _secure(address: str, server_name: str, options: Options, tls: grpc.ChannelCredentials) -> grpc.aio.Channel:
    name = [("grpc.ssl_target_name_override", server_name)] if server_name else []
    return grpc.aio.secure_channel(address, tls, options=[*_CLIENT_OPTIONS, *options, *name])


class StatusLost(Unavailable):
    """A call ended while this side was sending, and its status is lost: the peer may be unreachable or may have rejected it."""


def _is_status_lost(error: grpc.aio.AioRpcError) -> bool:
    """gRPC's client reports INTERNAL if the connection broke while it was sending (grpc#36066); no server sent that."""
    texts = f"{error.details()} {error.debug_error_string()}"  # gRPC names the operation in one of them
    return error.code() is grpc.StatusCode.INTERNAL and "execute_batch" in texts


@contextmanager
def errors() -> Iterator[None]:
    """Around client calls: a failed call raises the same `UpdraftError` that the server raised."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        kind = StatusLost if _is_status_lost(error) else _BY_STATUS.get(error.code(), UpdraftError)
        message = error.details() or error.code().name
        if kind is Unavailable:
            raise Unavailable(message, _retry_after_s(error)) from error
        raise kind(message) from error


@asynccontextmanager
async def unavailable_after(
    seconds: float, message: str, retry_after_s: float | None = None
) -> AsyncIterator[asyncio.Timeout]:
    """Raise Unavailable with this message if the block takes longer."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield limit
    except TimeoutError:
        if not limit.expired():  # it is the block's own
            raise
        raise Unavailable(message, retry_after_s) from None


def _retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    for name, value in error.trailing_metadata() or ():
        if name == _RETRY_AFTER:
            return float(value)
    return None


class ErrorsToStatus(grpc.aio.ServerInterceptor):
    """Maps denials and a servicer's exceptions to gRPC statuses, for all four kinds of method."""

    def __init__(self, access: Access | None = None, *, drain_s: float = 30.0) -> None:
        self._access = access
        self._drain_s = drain_s
        """How long a rejected client may still send, so that it gets its status; see `_drain`."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler; for an unknown method gRPC itself answers UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        request = "stream" if handler.request_streaming else "unary"
        kind = f"{request}_{'stream' if handler.response_streaming else 'unary'}"
        method = str(handler_call_details.method)
        call, behaviour = Call(), getattr(handler, kind)
        deserialize: Any = _limited(handler.request_deserializer, method)
        check = _CheckedRequests if handler.request_streaming else _checked
        try:
            if self._access is not None:
                call.caller = await self._access.admit(method, handler_call_details.invocation_metadata)
        except (Unauthenticated, Forbidden, Unavailable) as denial:
            behaviour, deserialize = _rejecting(handler, denial), None  # nothing from strangers is parsed
        _CALL.set(call)  # the task that runs this then runs the method
        if inspect.isasyncgenfunction(behaviour):
            wrapped: Callable[[Any, Any], Any] = _iterating(_valid_responses(behaviour, call), method, check)
        else:
            drain_s = None if handler.response_streaming else self._drain_s
            wrapped = _awaiting(_valid_response(behaviour, call), method, check, drain_s=drain_s)
        with_behaviour = getattr(grpc, f"{kind}_rpc_method_handler")
        return with_behaviour(
            wrapped, request_deserializer=deserialize, response_serializer=handler.response_serializer
        )


def _limited(deserialize: Callable[[bytes], Any] | None, method: str) -> Callable[[bytes], Any]:
    """Parses a message, or returns the error if it is too large: a deserializer that raises would become INTERNAL."""
    most = _LARGER_REQUESTS.get(method, _MAX_REQUEST_BYTES)

    def parse(data: bytes) -> Any:
        if len(data) > most:
            return InvalidInput(f"a message of {len(data)} bytes; {method.rpartition('/')[2]} takes at most {most}")
        return data if deserialize is None else deserialize(data)

    return parse


class _CheckedRequests:
    """A stream of requests that raises the error which `_limited` returned."""

    def __init__(self, requests: AsyncIterable[Any]) -> None:
        self._requests = requests

    def __aiter__(self) -> "_CheckedRequests":
        return self

    async def __anext__(self) -> Any:
        # Not in `__init__`: gRPC's `__aiter__` makes a generator, and Python warns of one that nobody reads.
        return _checked(await anext(aiter(self._requests)))


def _checked(request: Any) -> Any:
    if isinstance(request, InvalidInput):
        raise request
    return request


def _valid_response(behaviour: Callable[[Any, Any], Awaitable[Any]], call: Call) -> Callable[[Any, Any], Any]:
    """The behaviour of a call that ends when the caller's token expires."""
    valid_s = None if call.caller is None else call.caller.valid_s
    if valid_s is None:
        return behaviour

    async def valid(request: Any, context: Context) -> Any:
        async with unavailable_after(valid_s, _EXPIRED, 0.0) as call.limit:
            return await behaviour(request, context)

    return valid


def _valid_responses(
    behaviour: Callable[[Any, Any], AsyncGenerator[Any, None]], call: Call
) -> Callable[[Any, Any], AsyncGenerator[Any, None]]:
    """Like `_valid_response`, for a generator. A timeout around a `yield` would interrupt gRPC's code instead of ours."""
    valid_s = None if call.caller is None else call.caller.valid_s
    if valid_s is None:
        return behaviour

    async def valid(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + valid_s
        async with aclosing(behaviour(request, context)) as responses:
            while True:
                async with unavailable_after(ends_s - loop.time(), _EXPIRED, 0.0) as call.limit:
                    response = await anext(responses, _END)
                if response is _END:
                    return
                if loop.time() >= ends_s:  # the timeout only interrupts a response that waits
                    raise Unavailable(_EXPIRED, 0.0)
                yield response

    return valid


def _rejecting(handler: Any, error: UpdraftError) -> Callable[[Any, Any], Awaitable[NoReturn]]:
    async def reject(request: Any, _: Context) -> NoReturn:
        if handler.request_streaming and handler.response_streaming:
            # Read one message first: a pod that is still writing its first report would miss the status (grpc#36066).
            with suppress(TimeoutError):
                async with asyncio.timeout(_FIRST_MESSAGE_S):
                    await anext(aiter(request), None)
        raise error

    return reject


def _awaiting(
    behaviour: Callable[[Any, Any], Awaitable[Any]], method: str, check: Callable[[Any], Any], *, drain_s: float | None
) -> Callable[[Any, Any], Awaitable[Any]]:
    """For a single response, or (without `drain_s`) a handler that writes its stream of responses itself.

    A client of the latter reads while it writes and may never end its side, so it gets the status without draining.
    """

    async def call(request: Any, context: Context) -> Any:
        try:
            response = await behaviour(check(request), context)
        except Exception as error:  # noqa: BLE001 - every exception becomes a status
            is_denied = isinstance(error, Unauthenticated | Forbidden)
            await _drain(request, min(drain_s, _DENIED_DRAIN_S) if is_denied and drain_s else drain_s)
            await _abort(context, error, method)
        await _drain(request, drain_s)
        return response

    return call


async def _drain(request: Any, within_s: float | None) -> None:
    """Read the rest of a request stream: a grpc.aio client that is still writing loses the response (grpc#36066)."""
    if within_s is not None and isinstance(request, AsyncIterable):
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                async for _ in request:
                    pass


def _iterating(
    behaviour: Callable[[Any, Any], AsyncGenerator[Any, None]], method: str, check: Callable[[Any], Any]
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            # Its `finally` runs when the call ends.
            async with aclosing(behaviour(check(request), context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:  # noqa: BLE001 - every exception becomes a status
            await _abort(context, error, method)

    return call


async def _abort(context: Context, error: Exception, method: str) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):  # the servicer chose the status itself
        raise error
    if not isinstance(error, UpdraftError):
        logger.error("Call failed", exc_info=error, extra={"method": method})
        await context.abort(grpc.StatusCode.INTERNAL, f"{method} failed; see the server's log for the reason")
    wait_s = getattr(error, "retry_after_s", None)
    trailers = () if wait_s is None else ((_RETRY_AFTER, f"{wait_s:g}"),)
    await context.abort(grpc.StatusCode[error.status], str(error)[:_MAX_DETAILS], trailers)
