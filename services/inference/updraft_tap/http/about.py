"""Facts that the plugin tells of its server over HTTP, for `updraft attach --check`: GET /v1/updraft/plugin.

The server is asked first, so that its own checks of keys come before: it answers 404, because it has no such path.

Only the server's own HTTP process answers. The engine's other processes send their facts to the agent, in their hellos.
"""

import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from updraft_tap import __version__
from updraft_tap.wire import PROTOCOL

log = logging.getLogger(__name__)

PATH = "/v1/updraft/plugin"
"""Below /v1, which engines guard by their own API keys."""

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

Facts = Callable[[], Mapping[str, Any]]
"""protocol and tap (version of this package), engine: {name, version}, socket ("" if it is not set), agent (whether an agent
listens there), keys (whether clients need an API key), hooks: {function: why it is not in place, "" if it is}, server: the
configuration that the adapter read, or null."""


def facts(
    *, engine: str, version: str, socket: str, keys: bool, hooks: Mapping[str, str], server: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The answer; see `Facts`."""
    return {
        "protocol": PROTOCOL,
        "tap": __version__,
        "engine": {"name": engine, "version": version},
        "socket": socket,
        "agent": listens(socket) if socket else False,
        "keys": keys,
        "hooks": dict(hooks),
        "server": server,
    }


def is_asked(scope: Mapping[str, Any], path: str) -> bool:
    """Whether a request is for the facts."""
    return bool(scope["type"] == "http" and scope.get("method") == "GET" and path == PATH)


def instead_of_not_found(facts: Facts, send: Send) -> Send:
    """A `send` that answers with the facts where the server has status 404, and passes on any other answer."""
    is_replaced = False

    async def sent(message: MutableMapping[str, Any]) -> None:
        nonlocal is_replaced
        if message["type"] == "http.response.start" and message["status"] == 404:
            is_replaced = True
            await _answer(facts, send)
        elif not is_replaced:
            await send(message)

    return sent


async def _answer(facts: Facts, send: Send) -> None:
    """Answer with the facts; with status 500 if they cannot be read."""
    try:
        status, content = 200, dict(facts())
    except Exception as error:
        log.exception("Updraft cannot tell of its plugin", exc_info=error)
        status, content = 500, {"error": "the plugin cannot be read; see the server's log"}
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def listens(path: str) -> bool:
    """Whether a process listens on a Unix socket. Connects, and sends nothing."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0.0)
        try:
            probe.connect(path)
        except BlockingIOError:  # its queue is full
            return True
        except OSError:
            return False
    return True
