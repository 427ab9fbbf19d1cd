"""A TCP port that nobody listens on."""

import itertools
import os
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from updraft_chassis import ports


def _own_share() -> Iterator[int]:
    """This test worker's ports, each once per round, so that a port is not handed out again within seconds.

    Workers have no port in common: when all chose from the same ports, two of them collided about once in three runs.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    share = list(ports.PORTS[worker::num_workers])
    # Not the module's own generator: pytest-randomly resets its seed for each test, and workers would get the same ports.
    random.SystemRandom().shuffle(share)
    return itertools.cycle(share)


_share = _own_share()


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago. Prefer port 0 for servers that report the port they got."""
    return ports.free_port(_share)


@contextmanager
def preferred_ports_taken() -> Iterator[None]:
    """Hold the ports that `updraft up` prefers, as far as they are free, so that it takes others.

    Otherwise the stacks of two test workers that start at once choose the same ports.
    """
    with ExitStack() as stack:
        for port in (9091, 9092, 9093):
            with suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
        yield
