"""The console's server: on 127.0.0.1 only, in a thread, for the length of a block."""

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from updraft_chassis.errors import Conflict, Unavailable
from updraft_cli.backends.protocol import ConsoleBackend
from updraft_cli.ui.app import application
from updraft_cli.ui.observer import PACE, Observer, Pace
from updraft_cli.ui.security import Access
from updraft_cli.ui.site import FOLDER

HOST = "127.0.0.1"

_START_S = 30.0
_STOP_S = 2
_JOIN_S = 2.0 * _STOP_S
_POLL_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Console:
    address: str
    """With the token: whoever has it may use the console."""
    access: Access


@contextmanager
def serving(backend: ConsoleBackend, *, port: int = 0, pace: Pace = PACE) -> Iterator[Console]:
    """Serve the console of a backend; port 0 takes a free one.

    Conflict if the port is taken; and what the first read of the backend raises.
    """
    with _bound(port) as listener:
        access = Access(port=listener.getsockname()[1])
        observer = Observer(backend, pace)
        observer.begin()
        server = _Server(application(observer, access))
        thread = threading.Thread(target=server.run, args=([listener],), name="console", daemon=True)
        thread.start()
        try:
            server.wait_until_started(thread)
            yield Console(address=access.address, access=access)
        finally:
            server.should_exit = True
            observer.close()
            thread.join(_JOIN_S)  # both threads are daemons: a backend that does not answer holds nothing up


def has_scripts() -> bool:
    """Whether the libraries that update the pages in the browser were built into this installation."""
    return (FOLDER / "static" / "vendor" / "htmx.min.js").exists()


class _Server(uvicorn.Server):
    def __init__(self, app: object) -> None:
        config = uvicorn.Config(
            app,  # type: ignore[arg-type] # any ASGI application
            access_log=False,
            log_config=None,
            log_level=logging.WARNING,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=_STOP_S,
            http="h11",
            ws="none",
        )
        super().__init__(config)

    def wait_until_started(self, thread: threading.Thread) -> None:
        waited_s = 0.0
        while not self.started and thread.is_alive() and waited_s < _START_S:
            thread.join(_POLL_S)
            waited_s += _POLL_S
        if not self.started:
            raise Unavailable("the console did not start")


@contextmanager
def _bound(port: int) -> Iterator[socket.socket]:
    # With the protocol named, asyncio turns off Nagle's algorithm, which costs 40 ms per answer.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise Conflict(f"cannot use port {port}: {error.strerror}; choose another one with --port") from error
        yield listener
