"""Free TCP ports on 127.0.0.1, for servers that cannot bind port 0 and report the port that they got."""

import random
import socket
from collections.abc import Iterable

from updraft_chassis.errors import Unavailable

PORTS = range(20_000, 32_000)
"""Below the ports that Linux uses for outgoing connections (from 32768), so that none of them takes a port meanwhile."""


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a listener blocks the port, a closing connection does not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port(candidates: Iterable[int] | None = None) -> int:
    """The first free candidate; by default the candidates are all of PORTS in random order. Unavailable if none is free."""
    if candidates is None:
        candidates = random.SystemRandom().sample(PORTS, len(PORTS))
    port = next(filter(is_free, candidates), None)
    if port is None:
        raise Unavailable("no free port on 127.0.0.1")
    return port
