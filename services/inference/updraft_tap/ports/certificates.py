"""The certificate of a server's own port, read again when its files change, at the next handshake.

SGLang and vLLM can watch the files themselves (`--enable-ssl-refresh`). That follows the first renewal of a mounted Secret and
no later one, because the watched file is then another one; and SGLang does not bring the library that it needs for that.
"""

import inspect
import logging
import ssl
from pathlib import Path
from typing import Any

from updraft_tap import hooks
from updraft_tap.hooks import Binding, Hook
from updraft_tap.http.reloading import ReloadingFiles

log = logging.getLogger(__name__)

_FILES = ("certfile", "keyfile", "ca_certs")


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
    contexts: ReloadingFiles[ssl.SSLContext] = ReloadingFiles(
        files, lambda: original(*args, **kwargs), what="certificate"
    )

    def use_newest(connection: ssl.SSLSocket | ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        connection.context = contexts.get()

    first = contexts.get()
    first.sni_callback = use_newest  # also called if a client names no server
    return first


_BINDING = Binding(target="uvicorn.config.create_ssl_context", hook=_create, parameters=("certfile", "keyfile"))
