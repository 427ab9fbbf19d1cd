"""`updraft-trainer`, before torch is imported. UPDRAFT_TRAINER_* variables configure it."""

import argparse
import os
from pathlib import Path

from updraft_chassis import lifecycle, progress
from updraft_draft import memory

_NUM_KERNELS = 64
"""About as many as an optimizer step uses. The next one has samples of other lengths, and so other shapes."""


def main() -> None:
    """Run until SIGTERM or SIGINT, or until a command is done."""
    arguments = _parser().parse_args()
    memory.limit(os.environ, num_kernels=_NUM_KERNELS)
    if arguments.command == "self-play":
        lifecycle.let_signals_kill()
        with progress.on_stdout() as report:
            from updraft_trainer import self_play  # noqa: PLC0415 - takes seconds

            self_play.main(arguments.model, arguments.recordings, arguments.requests, arguments.output, report)
        return
    lifecycle.while_importing()
    from updraft_trainer import process  # noqa: PLC0415 - see above

    process.main()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="updraft-trainer",
        description="Train a draft model on live traffic. Configure it with UPDRAFT_TRAINER_* variables.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    play = commands.add_parser(
        "self-play",
        help="train a first draft from recordings of self-play, then exit",
        description="Train a draft from requests that `updraft-inference self-play` recorded. `updraft draft train` runs it.",
    )
    play.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="target model")
    play.add_argument("--recordings", type=Path, required=True, metavar="FOLDER", help="what to learn from")
    play.add_argument("--requests", type=int, required=True, metavar="N", help="how many of the recordings to use")
    play.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder for the draft")
    return parser


if __name__ == "__main__":
    main()
