"""`updraft-operator`, before anything large is imported."""

import sys

from updraft_chassis import lifecycle


def main() -> None:
    """Run until SIGTERM or SIGINT; with arguments, a command of `commands`."""
    if not sys.argv[1:]:
        lifecycle.while_importing()
    from updraft_operator import commands  # noqa: PLC0415 - takes a second

    commands.main(sys.argv[1:])


if __name__ == "__main__":
    main()
