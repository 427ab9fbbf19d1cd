"""Connections to Redis that send and receive large values in pieces, so that the event loop does not stand still meanwhile.

Rejected: hiredis, which makes each value in one go, while it holds Python's lock: a copy to new memory, every page of which the
kernel has to hand over first. `make bench-width ARGS='--rows path'` measures how long a loop stands still.
"""

import mmap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import redis.exceptions
from redis._parsers.resp2 import _AsyncRESP2Parser
from redis.asyncio import Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import AbstractConnection

# Of a value, sent or received at a time.
_PIECE_BYTES = 128 * 1024


class _Parser(_AsyncRESP2Parser):
    """Reads a large value into memory of its own, which goes back to the system when nobody uses the value any more."""

    async def _read(self, length: int) -> Any:
        if length <= _PIECE_BYTES:
            return await super()._read(length)
        # After an interrupted reply it would have what was read of it. redis-py closes the connection then.
        assert not self._buffer, "no reply was interrupted on this connection"
        stream: Any = self._stream
        value, end = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE), 0
        while end < length:
            piece = await stream.read(min(_PIECE_BYTES, length - end))
            if not piece:
                raise redis.exceptions.ConnectionError("the connection was closed within a value")
            value[end : end + len(piece)] = piece
            end += len(piece)
        await super()._read(0)  # the end of the line
        return memoryview(value).toreadonly()


class _InPieces(AbstractConnection):
    """Sends an entry in pieces, because asyncio may copy what a socket does not take at once."""

    async def _send_packed_command(self, command: Iterable[bytes]) -> None:
        """redis-py calls this when it is connected, with one timeout. All pieces go to one connection: on a new one Redis would
        take the middle of an entry, which is a client's text, for commands."""
        writer = self._writer
        for piece in _pieces(command):
            if writer is None or self._writer is not writer:
                raise redis.exceptions.ConnectionError("the connection was closed while a command was being sent")
            writer.write(piece)
            await writer.drain()


class _Tcp(_InPieces, Connection):
    pass


class _Tls(_InPieces, SSLConnection):
    """Reads its CA again for each connection, because the file may have changed."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        self.ssl_context.context = None  # redis-py's own, which it would keep
        arguments: Mapping[str, Any] = super()._connection_arguments()
        return arguments


class _Unix(_InPieces, UnixDomainSocketConnection):
    pass


_CONNECTIONS = {Connection: _Tcp, SSLConnection: _Tls, UnixDomainSocketConnection: _Unix}


def _pieces(command: Iterable[bytes]) -> Iterator[memoryview]:
    """The parts of a command in views of at most `_PIECE_BYTES`."""
    for part in command:
        view = memoryview(part)
        for first in range(0, len(view), _PIECE_BYTES):
            yield view[first : first + _PIECE_BYTES]


def use_pieces(client: Redis | RedisCluster) -> None:
    """Before it connects. Values of more than `_PIECE_BYTES` that it receives are then memoryviews."""
    if isinstance(client, RedisCluster):
        arguments: dict[str, Any] = client.get_connection_kwargs()  # of the nodes that it will find
        arguments["connection_class"] = _CONNECTIONS[arguments["connection_class"]]
        arguments["parser_class"] = _Parser
        for node in client.nodes_manager.startup_nodes.values():
            node.connection_class = _CONNECTIONS[node.connection_class]
            node.connection_kwargs["parser_class"] = _Parser
    else:
        pool = client.connection_pool
        pool.connection_class = _CONNECTIONS[pool.connection_class]
        pool.connection_kwargs["parser_class"] = _Parser
