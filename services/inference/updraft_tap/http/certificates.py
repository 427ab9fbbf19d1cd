"""The certificate of a server's own port, read again when its files change, at the next handshake.

SGLang and vLLM can watch the files themselves (`--enable-ssl-refresh`). That follows the first renewal of a mounted Secret and
no later one, because the watched file is then another one; and SGLang does not bring the library that it needs for that.
"""

import inspect
import logging
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from updraft_tap import hooks
from updraft_tap.hooks import Binding, Hook

log = logging.getLogger(__name__)

_FILES = ("certfile", "keyfile", "ca_certs")
Stamp = tuple[tuple[int, int, int] | None, ...]


class Newest:
    """A server's context, made again by `make` when one of `files` has changed. What is not valid is not used."""

    def __init__(self, make: Callable[[], ssl.SSLContext], files: Sequence[Path]) -> None:
        self._make = make
        self._files = files
        self._stamp = self._look()
        self.context = make()
        self.context.sni_callback = self._use  # also called if a client names no server

    def _use(self, connection: ssl.SSLSocket | ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self.context = self._make()
            except (OSError, ValueError) as error:  # SSLError is an OSError
                log.error("Updraft: the new certificate is not valid, the former one stays: %s", error)
            else:
                log.info("Updraft: the server uses its new certificate")
        connection.context = self.context

    def _look(self) -> Stamp:
        return tuple(_stamp(file) for file in self._files)


def follow() -> str:
    """Hook uvicorn, the HTTP server of both, where it makes the context. Returns why that cannot be; "" if it is done."""
    (problem,) = hooks.install((_BINDING,)).values()
    if problem:
        log.error("Updraft cannot follow renewed certificates: %s", problem)
    return problem


def _create(original: Hook, *args: Any, **kwargs: Any) -> ssl.SSLContext:
    """AROUND create_ssl_context."""
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    files = [Path(given[name]) for name in _FILES if given.get(name)]
    return Newest(lambda: original(*args, **kwargs), files).context


_BINDING = Binding(target="uvicorn.config.create_ssl_context", hook=_create, parameters=("certfile", "keyfile"))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
