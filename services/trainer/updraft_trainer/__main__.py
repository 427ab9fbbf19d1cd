"""`updraft-trainer`, before torch is imported."""

import os

from updraft_chassis import lifecycle
from updraft_draft import memory

_NUM_KERNELS = 64
"""About as many as an optimizer step uses. The next one has samples of other lengths, and so other shapes."""


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    lifecycle.while_importing()
    memory.limit(os.environ, num_kernels=_NUM_KERNELS)
    from updraft_trainer import process  # noqa: PLC0415 - takes seconds

    process.main()


if __name__ == "__main__":
    main()
