"""`updraft-inference`: one pod of a speculator, set up by UPDRAFT_INFERENCE_* variables."""

from updraft_chassis import lifecycle


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    lifecycle.while_importing()
    from updraft_inference import process  # noqa: PLC0415 - takes seconds

    process.main()


if __name__ == "__main__":
    main()
