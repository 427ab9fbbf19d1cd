"""`updraft-trainer`, before torch is imported. UPDRAFT_TRAINER_* variables configure it."""

import argparse
import os
from pathlib import Path

from updraft_chassis import lifecycle, progress
from updraft_draft import memory
from updraft_trainer import launch

_NUM_KERNELS = 64
"""About as many as an optimizer step uses. The next one has samples of other lengths, and so other shapes."""


def main() -> None:
    """Run until SIGTERM or SIGINT, or until a command is done."""
    arguments = _parser().parse_args()
    memory.limit(os.environ, num_kernels=_NUM_KERNELS)
    memory.use_huge_pages(os.environ)
    if arguments.command == "offline":
        lifecycle.let_signals_kill()
        with progress.on_stdout() as report:
            from updraft_trainer.offline import command  # noqa: PLC0415 - takes seconds

            options = command.OfflineOptions(epochs=arguments.epochs, origin=arguments.origin, region=arguments.region)
            command.main(arguments.model, arguments.traces, arguments.output, options, report)
        return
    lifecycle.while_importing()
    if arguments.command == "ranks":
        launch.main(
            launch.Launch(
                num_nodes=arguments.nodes,
                ranks_per_node=arguments.ranks_per_node,
                endpoint=arguments.endpoint,
                id=arguments.id,
                address=arguments.address,
                max_restarts=arguments.max_restarts,
                meeting_s=arguments.meeting_seconds,
            )
        )
        return
    from updraft_trainer import process  # noqa: PLC0415 - see above

    if arguments.command == "rank":
        launch.rank(process.main, os.environ)
    else:
        process.main()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="updraft-trainer",
        description="Train a draft model on live traffic. Configure it with UPDRAFT_TRAINER_* variables.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    ranks = commands.add_parser(
        "ranks",
        help="train with the ranks of several pods or GPUs",
        description="Run torchrun with the ranks of this pod, once all pods have met. The operator's manifests call it.",
    )
    ranks.add_argument("--nodes", type=int, required=True, metavar="N", help="number of pods")
    ranks.add_argument("--ranks-per-node", type=int, required=True, metavar="N", help="ranks of a pod: one per GPU")
    ranks.add_argument("--endpoint", required=True, metavar="HOST:PORT", help="where the pods meet: at the first one")
    ranks.add_argument("--id", required=True, metavar="TEXT", help="identifies the trainer; the same for all pods")
    text = "where the other pods reach this one; by default its host name"
    ranks.add_argument("--address", default="", metavar="HOST", help=text)
    text = "restarts of the ranks before the process ends; default 100"
    ranks.add_argument("--max-restarts", type=int, default=100, metavar="N", help=text)
    text = "how long to wait for the other pods; default 600"
    ranks.add_argument("--meeting-seconds", type=int, default=600, metavar="S", help=text)
    commands.add_parser("rank", help="one rank of several", description="`ranks` starts it, with torchrun's variables.")
    offline = commands.add_parser(
        "offline",
        help="train a draft from recorded traces, then exit",
        description="Train a draft from folders of traces, without a registry. `updraft draft train` runs it.",
    )
    offline.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="target model")
    offline.add_argument(
        "--traces", type=Path, action="append", required=True, metavar="FOLDER", help="what to learn from; repeatable"
    )
    offline.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder for the draft")
    offline.add_argument("--epochs", type=int, required=True, metavar="N", help="how often to train on each request")
    offline.add_argument(
        "--origin", required=True, metavar="TEXT", help="where the traces come from, for the provenance"
    )
    offline.add_argument("--region", default="", metavar="NAME", help="region of this machine")
    return parser


if __name__ == "__main__":
    main()
