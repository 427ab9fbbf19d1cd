"""A process's metrics, and HTTP for machines: /metrics for Prometheus, /healthz and /readyz for Kubernetes.

The server runs in a daemon thread of its own, so a scrape is answered while the event loop is busy and never delays a request.
"""

import hmac
import logging
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from updraft_chassis.errors import Conflict

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
"""A port's limit. Prometheus and a kubelet need three; every connection has a thread."""


class BulkHistogram(Histogram):
    """A histogram without labels that takes many observations at once: one by one, thousands hold an event loop for long."""

    def observe_many(self, counts: Iterable[int], total: float) -> None:
        """Add `counts[i]` observations to bucket i; the last bucket is +Inf. `total` is the sum of the observed values."""
        for bucket, num in zip(self._buckets, counts, strict=True):
            bucket.inc(num)
        self._sum.inc(total)


@dataclass(frozen=True, slots=True)
class MetricFactory:
    """Creates the metrics of one process, all of them named `<prefix>_<name>`."""

    registry: CollectorRegistry
    prefix: str

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{self.prefix}_{name}", text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{self.prefix}_{name}", text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"{self.prefix}_{name}", text, labels, buckets=buckets, registry=self.registry)

    def bulk_histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> BulkHistogram:
        return BulkHistogram(f"{self.prefix}_{name}", text, buckets=buckets, registry=self.registry)


@contextmanager
def serve(  # noqa: PLR0913 - all that a port is
    registry: CollectorRegistry,
    *,
    host: str,
    port: int,
    ready: Callable[[], bool],
    setting: str,
    alive: Callable[[], bool] = lambda: True,
    tls: ssl.SSLContext | None = None,
    token: Callable[[], str] | None = None,
) -> Iterator[int]:
    """Serve until the block ends; yield the port (port 0 selects a free one). With `tls` it speaks HTTPS only. With `token`,
    /metrics needs that bearer token; probes never do.

    `ready` and `alive` (/healthz) are called from other threads and may only read a flag. Raises Conflict, with the name of
    `setting`, if the port is not available.
    """
    try:
        httpd = make_server(host, port, _app(registry, ready, alive, token), server_class=_Server, handler_class=_Quiet)
        httpd.tls = tls
    except OSError as error:
        raise Conflict(f"cannot listen on {host}:{port} ({error.strerror}); set {setting}") from error
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True)
    thread.start()
    try:
        yield httpd.server_port
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def _app(
    registry: CollectorRegistry,
    ready: Callable[[], bool],
    alive: Callable[[], bool],
    token: Callable[[], str] | None,
) -> "WSGIApplication":
    scrape: WSGIApplication = make_wsgi_app(registry)

    def app(environ: "WSGIEnvironment", start: "StartResponse") -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics" if token is not None and not _has(token(), environ):
                return _plain(start, "401 Unauthorized", "a bearer token is needed")
            case "/metrics":
                return scrape(environ, start)
            case "/healthz":
                return _status(start, alive(), "ok", "stuck")
            case "/readyz":
                return _status(start, ready(), "ready", "not ready")
            case _:
                return _plain(start, "404 Not Found", "available: /metrics, /healthz, /readyz")

    return app


def _has(token: str, environ: "WSGIEnvironment") -> bool:
    given = str(environ.get("HTTP_AUTHORIZATION", ""))
    return hmac.compare_digest(given.encode(errors="replace"), f"Bearer {token}".encode())


def _status(start: "StartResponse", is_ok: bool, yes: str, no: str) -> list[bytes]:  # noqa: FBT001 - the result to report
    return _plain(start, "200 OK", yes) if is_ok else _plain(start, "503 Service Unavailable", no)


def _plain(start: "StartResponse", status: str, text: str) -> list[bytes]:
    start(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{text}\n".encode()]


class _Server(ThreadingMixIn, WSGIServer):
    """Closes the oldest of too many connections: whoever holds them all must not keep out a kubelet's probe."""

    daemon_threads = True  # a scrape that hangs must not keep the process alive
    block_on_close = False
    request_queue_size = (
        128  # of connections that wait to be accepted; by default 5, and the others try again after a second
    )

    tls: ssl.SSLContext | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._connections: dict[socket.socket, None] = {}
        self._lock = threading.Lock()

    def get_request(self) -> tuple[socket.socket, Any]:
        """The handshake is the thread's, whose time is limited."""
        request, address = super().get_request()
        if self.tls is not None:
            request = self.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        return request, address

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections[request] = None
            oldest = next(iter(self._connections)) if len(self._connections) > MAX_CONNECTIONS else None
            if oldest is not None:
                del self._connections[oldest]
        if oldest is not None:
            with suppress(OSError):  # it has just ended by itself
                # Not SSLSocket's own, which forgets its keys first: its thread would go on in plaintext.
                socket.socket.shutdown(oldest, socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was too slow or went away is no error; socketserver would print a traceback."""
        logger.debug("A connection to the metrics port broke", exc_info=sys.exc_info())


class _Quiet(WSGIRequestHandler):
    timeout = 10  # seconds, after which a silent scraper frees its thread

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the signature is http.server's
        logger.debug(format, *args)
