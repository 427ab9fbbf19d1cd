"""The certificate of a server's own port, read again when its files change, at the next handshake.

SGLang and vLLM can watch the files themselves (`--enable-ssl-refresh`). That follows the first renewal of a mounted Secret and
no later one, because the watched file is then another one; and SGLang does not bring the library that it needs for that.
"""

import inspect
import logging
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from updraft_tap import hooks
from updraft_tap.hooks import Binding, Hook
from updraft_tap.http.reloading import ReloadingFiles

log = logging.getLogger(__name__)

_FILES = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
_FACTORY = "ssl_context_factory"


def follow() -> str:
    """Hook uvicorn, the HTTP server of both, where it is configured. Returns why that cannot be; "" if it is done."""
    (problem,) = hooks.install((_CONFIG,)).values()
    if problem or _FACTORY not in inspect.signature(hooks.resolved(_CONFIG.target)).parameters:
        (problem,) = hooks.install((_CONTEXT,)).values()  # of another uvicorn: of one HTTP process only
    if problem:
        log.error("Updraft cannot follow renewed certificates: %s", problem)
    return problem


def newest(config: Any, make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """uvicorn's factory. Of several HTTP processes each calls it, before it imports the application and with it the plugin."""
    return _followed([getattr(config, name) for name in _FILES], make)


def _followed(files: Iterable[str | Path | None], make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    paths = [Path(file) for file in files if file]
    contexts: ReloadingFiles[ssl.SSLContext] = ReloadingFiles(paths, make, what="certificate")

    def use_newest(connection: ssl.SSLSocket | ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        connection.context = contexts.get()

    first = contexts.get()
    first.sni_callback = use_newest  # also called if a client names no server
    return first


def _configure(original: Hook, config: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND Config.__init__. A configuration is pickled for further processes, and the factory with it, by its name."""
    original(config, *args, **kwargs)
    if not config.ssl_certfile or not hasattr(config, _FACTORY):
        return
    if config.ssl_context_factory is None:
        config.ssl_context_factory = newest
    elif config.ssl_context_factory is not newest:
        log.error("Updraft cannot follow renewed certificates: the server has a factory of its own")


def _create(original: Hook, *args: Any, **kwargs: Any) -> ssl.SSLContext:
    """AROUND create_ssl_context."""
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    return _followed(map(given.get, ("certfile", "keyfile", "ca_certs")), lambda: original(*args, **kwargs))


_CONFIG = Binding(target="uvicorn.config.Config.__init__", hook=_configure, parameters=("self", "app"))
_CONTEXT = Binding(target="uvicorn.config.create_ssl_context", hook=_create, parameters=("certfile", "keyfile"))
