"""`updraft-registry`, before anything large is imported."""

import os
import sys

from updraft_chassis import heaps, lifecycle

_NUM_HEAPS = 1
"""With heaps for gRPC's threads, a thousand uploads that stopped half-way left 3 to 56 MB behind; with one, 3 to 24 MB."""


def main() -> None:
    """Run until SIGTERM or SIGINT; with arguments, a command of `maintenance`."""
    heaps.limit(os.environ, _NUM_HEAPS)
    if not sys.argv[1:]:  # Ctrl-C during a command must not look like its end
        lifecycle.while_importing()
    from updraft_registry import process  # noqa: PLC0415 - takes a second

    process.main()


if __name__ == "__main__":
    main()
