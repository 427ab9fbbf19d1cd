"""Carries connections from a socket of one network namespace to a server in another.

A socket stays in the namespace where it was bound: the machine's side binds it and hands it down, and the cluster's
side, which cannot be reached from outside in any other way, takes connections from it.
"""

import asyncio
import socket
import threading

_CHUNK_BYTES = 65_536


def start(listener: socket.socket, host: str, port: int) -> None:
    """Relay every connection of `listener` to `host:port`, in a thread that ends with the process."""
    threading.Thread(target=lambda: asyncio.run(_serve(listener, host, port)), daemon=True).start()


async def _serve(listener: socket.socket, host: str, port: int) -> None:
    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError:  # the server is away: so are we
            writer.close()
            return
        await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))

    async with await asyncio.start_server(carry, sock=listener) as server:
        await server.serve_forever()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction; when its end comes the other side is told, and may still talk."""
    try:
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:  # either side is gone
        writer.close()
