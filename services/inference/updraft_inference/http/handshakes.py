"""TLS on the clients' port: handshakes are limited in time and number, as connections without a request are.

asyncio tells a protocol about a connection only after its handshake. So this protocol takes the connection first.
"""

import asyncio
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import cast


class Handshakes:
    """`max_running` handshakes take at most `timeout_s` each; beyond that number, the oldest is cut off."""

    def __init__(self, context: ssl.SSLContext, *, max_running: int, timeout_s: float) -> None:
        self._context = context
        self._max_running = max_running
        self._timeout_s = timeout_s
        self._running: dict[asyncio.Transport, None] = {}
        """The oldest first, without those that were cut off."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def before(self, protocol: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """A factory of connections that become those of `protocol` after their handshake."""
        return lambda: _Handshake(self, protocol)

    def start(self, transport: asyncio.Transport, waiting: "_Handshake") -> None:
        if self._is_closed:
            transport.abort()
            return
        self._running[transport] = None
        task = asyncio.get_running_loop().create_task(self._shake(transport, waiting))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if len(self._running) > self._max_running:
            self._cut_off(next(iter(self._running)))

    def close(self) -> None:
        """Cut off those that run and those that come."""
        self._is_closed = True
        for transport in list(self._running):
            self._cut_off(transport)

    def _cut_off(self, transport: asyncio.Transport) -> None:
        """Removed from the count at once: its task ends later, and a burst would otherwise select it again."""
        del self._running[transport]
        transport.abort()

    async def _shake(self, transport: asyncio.Transport, waiting: "_Handshake") -> None:
        try:
            if transport.is_closing():  # cut off before this task began
                return
            with suppress(OSError):  # of TLS, of time, or because the client went away
                encrypted = await asyncio.get_running_loop().start_tls(
                    transport, waiting, self._context, server_side=True, ssl_handshake_timeout=self._timeout_s
                )
                if encrypted is not None:  # it was cut off meanwhile
                    self._pass_on(encrypted, waiting)
        finally:
            self._running.pop(transport, None)

    def _pass_on(self, encrypted: asyncio.Transport, waiting: "_Handshake") -> None:
        """Hand the connection over, or abort it after `close`, when nobody would end it."""
        if self._is_closed:
            encrypted.abort()
        else:
            waiting.pass_on(encrypted)


class _Handshake(asyncio.Protocol):
    """Keeps what a client sends with the end of its handshake."""

    def __init__(self, handshakes: Handshakes, protocol: Callable[[], asyncio.Protocol]) -> None:
        self._handshakes = handshakes
        self._protocol = protocol
        self._received = b""
        self._is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._handshakes.start(cast("asyncio.Transport", transport), self)

    def data_received(self, data: bytes) -> None:
        self._received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over = True

    def pass_on(self, encrypted: asyncio.Transport) -> None:
        """The handshake is done: the connection is another protocol's."""
        if self._is_over:
            return
        protocol = self._protocol()
        encrypted.set_protocol(protocol)
        protocol.connection_made(encrypted)
        if self._received:
            protocol.data_received(self._received)
