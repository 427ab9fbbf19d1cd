"""`updraft-registry`, before anything large is imported."""

import sys

from updraft_chassis import lifecycle


def main() -> None:
    """Run until SIGTERM or SIGINT; with arguments, a command of `maintenance`."""
    if not sys.argv[1:]:  # Ctrl-C during a command must not look like its end
        lifecycle.while_importing()
    from updraft_registry import process  # noqa: PLC0415 - takes a second

    process.main()


if __name__ == "__main__":
    main()
