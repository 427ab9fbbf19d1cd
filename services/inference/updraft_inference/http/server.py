"""The HTTP server: uvicorn on a socket that we bind, without its signal handlers.

Binding ourselves gives a clear error if the port is taken. The process stops the server, because draining needs more
than uvicorn knows. Not used: uvicorn's own TLS, which reads a certificate once, and waits a minute for a handshake.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from updraft_chassis.errors import Conflict
from updraft_inference.http.connection import BACKLOG, ClientLimits, Config, Connection
from updraft_inference.http.handshakes import Handshakes


class Server(uvicorn.Server):
    """Runs until `stop`; the process handles signals. With `tls`, clients have to speak TLS."""

    def __init__(self, app: ASGIApp, clients: ClientLimits, tls: ssl.SSLContext | None = None) -> None:
        self._config = Config(app, clients)
        super().__init__(self._config)
        self.servers = []  # uvicorn sets it only at startup
        self._handshakes = (
            None if tls is None else Handshakes(tls, max_running=clients.max_open, timeout_s=clients.stall_s)
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `stop`. If cancelled, close the listener."""
        try:
            await super().serve(sockets)
        finally:
            for server in self.servers:
                server.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on these sockets."""
        await super().startup(sockets=[])

        def connection() -> asyncio.Protocol:
            return Connection(self._config, self.server_state, self.lifespan.state)

        protocol = connection if self._handshakes is None else self._handshakes.before(connection)
        for each in sockets or ():
            listening = await asyncio.get_running_loop().create_server(protocol, sock=each, backlog=BACKLOG)
            self.servers.append(listening)

    def stop(self) -> None:
        """Close the listener and idle connections, then return from `serve`."""
        self.should_exit = True
        if self._handshakes is not None:
            self._handshakes.close()


def listen(host: str, port: int, *, setting: str) -> socket.socket:
    """A listening socket. Raises Conflict that names `setting` if the port cannot be bound."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or error
        raise Conflict(f"port {port} on {host} is taken or not allowed ({reason}); set {setting}") from error
