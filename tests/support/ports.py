"""A TCP port that nobody listens on."""

import random
import socket

# Below the ports that the kernel gives to outgoing connections (from 32768 on): none of them takes it meanwhile.
_PORTS = range(20_000, 32_000)

# Not the module's own generator: pytest-randomly seeds that anew for each fixture and test, which would share ports.
_choice = random.SystemRandom()


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free a moment ago; prefer port 0 where the server can tell what it got."""
    while True:
        port = _choice.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
