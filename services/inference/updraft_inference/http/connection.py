"""One client connection: uvicorn's, with limits on idle and stalled clients.

A client that sends no request, or stops reading its answer, is disconnected. When there are too many connections, those
that have been idle longest are closed first, so that probes always get in. Not used: uvicorn's limit_concurrency, whose
plain 503 would affect probes too, and its keep-alive timer alone, which does not run before the first answer and
restarts at every byte.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

BACKLOG = 2048
"""Connections that the kernel queues until they are accepted."""

_SPARE = 64
"""Connections above the limit, for probes and for clients that receive the error."""

_HEAD_BYTES = 16 * 1024
"""Limit on a request's line and headers: h11's default, made explicit."""

_KEEP_ALIVE_S = 15
"""Longer than client connection pools keep a connection (httpx: 5 s), so that the server never closes one on which a
request is arriving."""

_GRACE_S = 2
"""Running requests have been drained before; this is for the last bytes of answers."""

_CLOSE_S = 1
"""For the answer to the end of TLS, which an idle client gives only when it reads again. Shorter than `_GRACE_S`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    max_connections: int
    stall_s: float
    """Limit on the time to receive the head of a request, and on the time for which written data stays unread."""

    @property
    def max_open(self) -> int:
        """Number of connections from which on idle ones are closed."""
        return self.max_connections + _SPARE


class Config(uvicorn.Config):
    """uvicorn's configuration, plus the limits on clients."""

    def __init__(self, app: ASGIApp, clients: ClientLimits) -> None:
        super().__init__(
            app,
            http=Connection,
            access_log=False,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            lifespan="off",
            log_config=None,
            log_level="warning",  # INFO would repeat our own log in colour
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
            timeout_keep_alive=_KEEP_ALIVE_S,
            ws="none",
        )
        self.clients = clients


class _Deadline:
    """Calls `act` after `delay_s`, unless it is stopped."""

    def __init__(self, delay_s: float, act: Callable[[], object]) -> None:
        self._delay_s = delay_s
        self._act = act
        self._timer: asyncio.TimerHandle | None = None

    @property
    def due_s(self) -> float | None:
        """When it expires, on the event loop's clock; None if it is not running."""
        return None if self._timer is None else self._timer.when()

    def start(self) -> None:
        self.stop()
        self._timer = asyncio.get_running_loop().call_later(self._delay_s, self._act)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Connection(H11Protocol):
    """Runs one deadline while there is no request, and another while the client leaves data unread."""

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], **options: Any) -> None:
        super().__init__(config, server_state, app_state, **options)
        self._max_open = config.clients.max_open
        self._request = _Deadline(config.clients.stall_s, self.cut_off)
        self._reading = _Deadline(config.clients.stall_s, self.cut_off)

    @property
    def idle_until_s(self) -> float | None:
        """When a connection without a request will be closed, on the event loop's clock; None during a request."""
        return self._request.due_s

    def cut_off(self) -> None:
        """Close without waiting for the client to read; this cancels its request."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        # Writers wait until the kernel has taken everything. Not 0, at which asyncio's TLS pauses a writer of nothing.
        transport.set_write_buffer_limits(high=1)
        self._make_room()
        self._request.start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request.stop()
        self._reading.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Only a complete head ends the wait for a request."""
        super().data_received(data)
        if self._has_request():
            self._request.stop()

    def on_response_complete(self) -> None:
        """Wait for the next request, unless it has already arrived."""
        super().on_response_complete()
        if not self._has_request() and not self.transport.is_closing():
            self._request.start()

    def shutdown(self) -> None:
        """The server ends: close an idle connection, whether or not its client answers."""
        super().shutdown()
        if not self._has_request():
            asyncio.get_running_loop().call_later(_CLOSE_S, self.cut_off)

    def pause_writing(self) -> None:
        """The kernel's buffer is full because the client does not read."""
        super().pause_writing()
        self._reading.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reading.stop()

    def _has_request(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request, despite uvicorn's types
        return cycle is not None and not cycle.response_complete

    def _make_room(self) -> None:
        if len(self.connections) > self._max_open:
            idle = [c for c in self.connections if isinstance(c, Connection) and c.idle_until_s is not None]
            if idle:
                min(idle, key=lambda connection: connection.idle_until_s or 0.0).cut_off()
