"""Connections to a Redis that somebody else may stand behind: whoever may create pods in its namespace chooses its answers."""

from typing import Any

import redis.exceptions
from redis._parsers.resp2 import _AsyncRESP2Parser
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import AbstractConnection

from updraft_chassis import streams

MAX_BYTES = 1 << 20
"""All answers on a connection together."""


class _Bounded(_AsyncRESP2Parser):
    """Stops before it keeps more than `MAX_BYTES`. Refused: hiredis, which reserves memory for as many elements as an answer
    announces."""

    def on_connect(self, connection: AbstractConnection) -> None:
        super().on_connect(connection)  # type: ignore[no-untyped-call]
        self._num_left = MAX_BYTES

    async def _read(self, length: int) -> bytes:
        self._spend(length + 2)
        return bytes(await super()._read(length))

    async def _readline(self) -> bytes:
        line = bytes(await super()._readline())  # asyncio limits a line to 64 KiB
        self._spend(len(line) + 2)
        return line

    def _spend(self, num_bytes: int) -> None:
        self._num_left -= num_bytes
        if self._num_left < 0:
            raise redis.exceptions.InvalidResponse(f"its answers are longer than {MAX_BYTES} bytes")


def bounded(client: streams.Client) -> streams.Client:
    """The client, before it connects, with bounded answers."""
    if isinstance(client, RedisCluster):
        arguments: list[dict[str, Any]] = [client.get_connection_kwargs()]
        arguments += [node.connection_kwargs for node in client.nodes_manager.startup_nodes.values()]
    else:
        arguments = [client.connection_pool.connection_kwargs]
    for each in arguments:
        each["parser_class"] = _Bounded
    return client
