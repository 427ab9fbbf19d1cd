"""A real Redis Cluster of three nodes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import redis
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.wait import wait_until

SLOTS = 16384
BUS = 10_000
"""A node's bus has its port and this much."""
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Node:
    server: RedisServer
    port: int

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.port}"

    def call(self, *words: str | int) -> object:
        with redis.Redis(port=self.port) as client:
            return client.execute_command(*words)


def bus_port() -> int:
    while (port := free_port()) + BUS > 2**16 - 1:
        pass
    return port


def started(folder: Path, stack: ExitStack) -> Node:
    """Another program may take a port before the node does."""
    for attempt in range(_ATTEMPTS):
        inside, port = folder / str(attempt), bus_port()
        inside.mkdir(parents=True)
        settings = {"port": str(port), "bind": "127.0.0.1", "cluster-enabled": "yes", "cluster-node-timeout": "2000"}
        with suppress(ChildProcessError):
            return Node(stack.enter_context(RedisServer(inside, durable=True, settings=settings)), port)
    raise AssertionError(f"no node of a cluster started with {_ATTEMPTS} ports")


@contextmanager
def redis_cluster(folder: Path) -> Iterator[list[Node]]:
    """Three primaries that share the slots."""
    with ExitStack() as stack:
        made = [started(folder / str(number), stack) for number in range(3)]
        bounds = [SLOTS * number // 3 for number in range(4)]
        for number, node in enumerate(made):
            node.call("CLUSTER", "ADDSLOTS", *range(bounds[number], bounds[number + 1]))
            made[0].call("CLUSTER", "MEET", "127.0.0.1", node.port)
        wait_until(lambda: all(_is_whole(node) for node in made), what="the cluster")
        yield made


def _is_whole(node: Node) -> bool:
    with redis.Redis(port=node.port) as client:
        info = client.cluster("INFO")
    return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == "3"  # type: ignore[no-any-return] # a dict
