"""A TCP port that nobody listens on."""

import itertools
import os
import random
import socket
from collections.abc import Iterator

# Below the ports that the kernel gives to outgoing connections (from 32768 on): none of them takes it meanwhile.
_FIRST, _LAST = 20_000, 32_000


def _own_share() -> Iterator[int]:
    """This test worker's ports, each once in each round: a port is taken only seconds after it is handed out.

    Two workers have no port in common; when both chose from all of them, they met about once in three runs.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = list(range(_FIRST + worker, _LAST, workers))
    # Not the module's own generator: pytest-randomly seeds that anew for each fixture and test, which would share ports.
    random.SystemRandom().shuffle(ports)
    return itertools.cycle(ports)


_ports = _own_share()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free a moment ago; prefer port 0 where the server can tell what it got."""
    return next(port for port in _ports if _is_free(port))
