"""A real Redis Cluster of three nodes, with TLS between them and to clients if one likes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import redis
from tests.support.certificates import Authority
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.wait import wait_until

SLOTS = 16384
BUS = 10_000
"""A node's bus has its port and this much."""
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Encryption:
    """A redis-server with TLS, and who signs the certificates of its nodes."""

    program: Path
    authority: Authority

    def settings(self) -> dict[str, str]:
        made = self.authority.server()
        return {
            "tls-cluster": "yes",
            "tls-auth-clients": "no",
            "tls-ca-cert-file": str(self.authority.file),
            "tls-cert-file": str(made.cert_file),
            "tls-key-file": str(made.key_file),
        }


@dataclass(frozen=True, slots=True)
class Node:
    server: RedisServer
    port: int
    tls: Encryption | None = None

    @property
    def url(self) -> str:
        if self.tls is None:
            return f"redis+cluster://127.0.0.1:{self.port}"
        return f"rediss+cluster://127.0.0.1:{self.port}?ssl_ca_certs={self.tls.authority.file}"

    def call(self, *words: str | int) -> object:
        with redis.Redis.from_url(self.server.url) as client:
            return client.execute_command(*words)


def bus_port() -> int:
    while (port := free_port()) + BUS > 2**16 - 1:
        pass
    return port


def started(folder: Path, stack: ExitStack, tls: Encryption | None = None) -> Node:
    """Another program may take a port before the node does."""
    encrypted, program = ({}, None) if tls is None else (tls.settings(), tls.program)
    for attempt in range(_ATTEMPTS):
        inside, port = folder / str(attempt), bus_port()
        inside.mkdir(parents=True)
        settings = {
            "port" if tls is None else "tls-port": str(port),
            "bind": "127.0.0.1",
            "cluster-enabled": "yes",
            "cluster-node-timeout": "2000",
            **encrypted,
        }
        with suppress(ChildProcessError):
            server = RedisServer(inside, durable=True, settings=settings, program=program)
            return Node(stack.enter_context(server), port, tls)
    raise AssertionError(f"no node of a cluster started with {_ATTEMPTS} ports")


@contextmanager
def redis_cluster(folder: Path, tls: Encryption | None = None) -> Iterator[list[Node]]:
    """Three primaries that share the slots."""
    with ExitStack() as stack:
        made = [started(folder / str(number), stack, tls) for number in range(3)]
        bounds = [SLOTS * number // 3 for number in range(4)]
        for number, node in enumerate(made):
            node.call("CLUSTER", "ADDSLOTS", *range(bounds[number], bounds[number + 1]))
            made[0].call("CLUSTER", "MEET", "127.0.0.1", node.port)
        wait_until(lambda: all(_is_whole(node) for node in made), what="the cluster")
        yield made


def _is_whole(node: Node) -> bool:
    with redis.Redis.from_url(node.server.url) as client:
        info = client.cluster("INFO")
    return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == "3"  # type: ignore[no-any-return] # a dict
