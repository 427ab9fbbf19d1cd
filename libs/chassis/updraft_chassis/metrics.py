"""The HTTP edge for machines: /metrics for Prometheus, /healthz and /readyz for Kubernetes.

A daemon thread of its own: a scrape is answered while the event loop is busy, and never delays a request.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from updraft_chassis.errors import Conflict

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger(__name__)


@contextmanager
def serve(
    registry: CollectorRegistry,
    *,
    host: str,
    port: int,
    ready: Callable[[], bool],
    setting: str,
    alive: Callable[[], bool] = lambda: True,
) -> Iterator[int]:
    """Serve until the block ends; yield the port (a free one for 0).

    Conflict names `setting` when the port cannot be had. `ready` and `alive` (/healthz) run in other threads: they only
    read a flag.
    """
    try:
        httpd = make_server(host, port, _app(registry, ready, alive), server_class=_Server, handler_class=_Quiet)
    except OSError as error:
        raise Conflict(f"port {port} on {host} is taken or not allowed ({error.strerror}); set {setting}") from error
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True)
    thread.start()
    try:
        yield httpd.server_port
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def _app(registry: CollectorRegistry, ready: Callable[[], bool], alive: Callable[[], bool]) -> "WSGIApplication":
    scrape: WSGIApplication = make_wsgi_app(registry)

    def app(environ: "WSGIEnvironment", start: "StartResponse") -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                return scrape(environ, start)
            case "/healthz":
                return _answer(start, alive(), "ok", "stuck")
            case "/readyz":
                return _answer(start, ready(), "ready", "not ready")
            case _:
                return _plain(start, "404 Not Found", "here are /metrics, /healthz and /readyz")

    return app


def _answer(start: "StartResponse", is_well: bool, well: str, ill: str) -> list[bytes]:  # noqa: FBT001 - the answer itself
    return _plain(start, "200 OK", well) if is_well else _plain(start, "503 Service Unavailable", ill)


def _plain(start: "StartResponse", status: str, text: str) -> list[bytes]:
    start(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{text}\n".encode()]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a scrape that hangs must not keep the process alive
    block_on_close = False


class _Quiet(WSGIRequestHandler):
    timeout = 10  # seconds: a scraper that connects and says nothing frees its thread

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the signature is http.server's
        logger.debug(format, *args)
