"""The HTTP server: uvicorn on a socket that we bind, without its signal handlers.

Binding ourselves gives a clear error if the port is taken. The process stops the server, because draining needs more
than uvicorn knows.
"""

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from updraft_chassis.errors import Conflict
from updraft_inference.http.connection import BACKLOG, ClientLimits, Config


class Server(uvicorn.Server):
    """Runs until `stop`; the process handles signals."""

    def __init__(self, app: ASGIApp, clients: ClientLimits) -> None:
        super().__init__(Config(app, clients))
        self.servers = []  # uvicorn sets it only at startup

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

    def stop(self) -> None:
        """Close the listener and idle connections, then return from `serve`."""
        self.should_exit = True


def listen(host: str, port: int, *, setting: str) -> socket.socket:
    """A listening socket. Raises Conflict that names `setting` if the port cannot be bound."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or error
        raise Conflict(f"port {port} on {host} is taken or not allowed ({reason}); set {setting}") from error
