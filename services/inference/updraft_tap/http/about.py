"""Facts about the plugin and its server for `updraft attach --check`: GET /updraft/plugin, behind the API key.

Only the server's own HTTP process answers. The engine's other processes send their facts to the agent, in their hellos.
"""

import json
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from updraft_tap import __version__
from updraft_tap.wire import PROTOCOL

PATH = "/updraft/plugin"

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


async def answer(facts: Facts, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]) -> None:
    """Answer with the facts; with status 500 and the reason if they cannot be read."""
    try:
        status, content = 200, dict(facts())
    except Exception as error:  # noqa: BLE001  (otherwise it would be logged as the server's error)
        status, content = 500, {"error": f"{type(error).__name__}: {error}"}
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
