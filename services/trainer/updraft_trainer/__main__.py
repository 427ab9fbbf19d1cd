"""`updraft-trainer`, before torch is imported."""

from updraft_chassis import lifecycle


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    lifecycle.while_importing()
    from updraft_trainer import process  # noqa: PLC0415 - takes seconds

    process.main()


if __name__ == "__main__":
    main()
