"""`updraft-operator`, before anything large is imported."""

import os
import sys

from updraft_chassis import heaps, lifecycle

_NUM_HEAPS = 1
"""Python runs one thread at a time anyway. With heaps for gRPC's threads, 200 connections to registries took 12 MB more."""


def main() -> None:
    """Run until SIGTERM or SIGINT; with arguments, a command of `commands`."""
    heaps.limit(os.environ, _NUM_HEAPS)
    if not sys.argv[1:]:
        lifecycle.while_importing()
    from updraft_operator import commands  # noqa: PLC0415 - takes a second

    commands.main(sys.argv[1:])


if __name__ == "__main__":
    main()
