"""One client's connection: uvicorn's, with bounds on what a client may hold.

A client that sends no request, or takes no more of its answer, is cut off. Where there are too many connections, those
that have been without a request for longest go first, so that a probe always gets in. Refused: uvicorn's own
limit_concurrency, whose plain 503 would meet the probes too, and its keep-alive timer alone, which does not run before
a first answer and starts again at every byte.
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
"""Connections that the kernel keeps until we accept them."""

_SPARE = 64
"""Connections beyond the limit: probes, and clients that are told that it is reached."""

_HEAD_BYTES = 16 * 1024
"""Of a request's line and headers: h11's default, stated."""

_KEEP_ALIVE_S = 15
"""Longer than the pools of clients keep a connection (httpx: 5 s): who closes first meets no request on its way."""

_GRACE_S = 2
"""Running requests have drained before; this is for answers on their last bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """What clients may hold."""

    max_connections: int
    stall_s: float
    """Until the head of a request is here, and until what was written of an answer is taken."""


class Config(uvicorn.Config):
    """uvicorn's configuration, and ours of a connection."""

    def __init__(self, app: ASGIApp, clients: ClientLimits) -> None:
        super().__init__(
            app,
            http=Connection,
            access_log=False,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            lifespan="off",
            log_config=None,
            log_level="warning",  # it colours what it says at INFO, and we say the same
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
        """On the loop's clock; None while it does not run."""
        return None if self._timer is None else self._timer.when()

    def start(self) -> None:
        """Run from now."""
        self.stop()
        self._timer = asyncio.get_running_loop().call_later(self._delay_s, self._act)

    def stop(self) -> None:
        """Do not run."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Connection(H11Protocol):
    """While there is no request a deadline runs, and another one while the client leaves bytes unread."""

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], **options: Any) -> None:
        super().__init__(config, server_state, app_state, **options)
        self._max_connections = config.clients.max_connections
        self._request = _Deadline(config.clients.stall_s, self.cut_off)
        self._reading = _Deadline(config.clients.stall_s, self.cut_off)

    @property
    def idle_until_s(self) -> float | None:
        """When (on the loop's clock) a connection without a request is cut off; None while there is one."""
        return self._request.due_s

    def cut_off(self) -> None:
        """Close without waiting for the client to read; what runs for it is cancelled."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Make room, and wait for a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # whoever writes waits until the kernel has taken it all
        self._make_room()
        self._request.start()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more; the request, if there is one, hears that its client left."""
        self._request.stop()
        self._reading.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Only a whole head ends the wait for a request."""
        super().data_received(data)
        if self._has_request():
            self._request.stop()

    def on_response_complete(self) -> None:
        """Wait for the next request, unless it is here already."""
        super().on_response_complete()
        if not self._has_request() and not self.transport.is_closing():
            self._request.start()

    def pause_writing(self) -> None:
        """The client has left bytes unread, and the kernel's buffer is full."""
        super().pause_writing()
        self._reading.start()

    def resume_writing(self) -> None:
        """All that was written is taken."""
        super().resume_writing()
        self._reading.stop()

    def _has_request(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first, whatever uvicorn's types say
        return cycle is not None and not cycle.response_complete

    def _make_room(self) -> None:
        if len(self.connections) > self._max_connections + _SPARE:
            idle = [one for one in self.connections if isinstance(one, Connection) and one.idle_until_s is not None]
            if idle:
                min(idle, key=lambda one: one.idle_until_s or 0.0).cut_off()
