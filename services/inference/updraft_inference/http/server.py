"""The HTTP server: uvicorn on a socket of ours, without its signal handlers.

We bind, so that a taken port is a sentence; the process stops the server, because draining needs more than
uvicorn knows.
"""

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from updraft_chassis.errors import Conflict
from updraft_inference.http.connection import BACKLOG, ClientLimits, Config


class Server(uvicorn.Server):
    """Runs until `stop`; whoever owns the process handles its signals."""

    def __init__(self, app: ASGIApp, clients: ClientLimits) -> None:
        super().__init__(Config(app, clients))
        self.servers = []  # uvicorn sets it when it starts

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `stop`; cancelled (the process fails), no longer listen."""
        try:
            await super().serve(sockets)
        finally:
            for server in self.servers:
                server.close()

    def stop(self) -> None:
        """Close the listener and idle connections, then return from `serve`."""
        self.should_exit = True


def listen(host: str, port: int, *, setting: str) -> socket.socket:
    """A listening socket; Conflict names `setting` when the port cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or error
        raise Conflict(f"port {port} on {host} is taken or not allowed ({reason}); set {setting}") from error
