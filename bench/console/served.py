"""A console of a large fleet that changes every second: `python -m bench.console.served PODS VERSIONS` prints its address.

The fleet is in memory, so what is measured is the console, not a registry. Every second all pods report, every twentieth one
has swapped, and the message of the speculator says when this was.
"""

import sys
import time
from dataclasses import replace
from datetime import UTC, datetime

from tests.support.console import memory_backend, state

from updraft_cli.backends.snapshot import Snapshot
from updraft_cli.ui.server import serving

MARK = "changed at "
EVERY_S = 1.0


def changed(snapshot: Snapshot, turn: int) -> Snapshot:
    """The next state."""
    now = datetime.now(UTC)
    (one, *others) = snapshot.speculators
    pods = tuple(
        replace(
            pod,
            last_report=now,
            running_requests=(turn + i) % 9,
            version=one.speculator.stable if (turn + i) % 20 else one.speculator.candidate,
        )
        for i, pod in enumerate(one.pods)
    )
    speculator = replace(one.speculator, message=f"{MARK}{time.time():.3f}")
    return replace(snapshot, time=now, speculators=(replace(one, pods=pods, speculator=speculator), *others))


def main() -> None:
    pods, versions = map(int, sys.argv[1:])
    backend = memory_backend(state(num_pods=pods, num_versions=versions))
    with serving(backend) as console:
        print(console.address, flush=True)
        turn = 0
        while True:
            time.sleep(EVERY_S)
            turn += 1
            backend.memory.snapshot = changed(backend.memory.snapshot, turn)


if __name__ == "__main__":
    main()
