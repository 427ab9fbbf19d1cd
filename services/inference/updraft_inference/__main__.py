"""`updraft-inference`: one pod of a speculator. UPDRAFT_INFERENCE_* variables configure it; two of them are also arguments."""

import argparse
import os
from pathlib import Path

from updraft_chassis import lifecycle

_ARGUMENTS = ("engine", "attach")
"""Settings that can also be passed as arguments."""


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.command == "self-play":
        lifecycle.let_signals_kill()
    else:
        lifecycle.while_importing()
    from updraft_inference import process  # noqa: PLC0415 - takes seconds

    if arguments.command == "prepare-sglang":
        process.prepare_sglang(
            os.environ, plugin=arguments.plugin_dir, seed=arguments.seed, key_file=arguments.admin_key_file
        )
        return
    if arguments.command == "self-play":
        process.self_play(os.environ, model=arguments.model, folder=arguments.recordings, count=arguments.requests)
        return
    overrides = {f"UPDRAFT_INFERENCE_{name.upper()}": getattr(arguments, name) for name in _ARGUMENTS}
    process.main(os.environ | {name: value for name, value in overrides.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="updraft-inference",
        description="Serve a model with a draft model that keeps learning. Configure it with UPDRAFT_INFERENCE_* variables.",
    )
    parser.add_argument(
        "--engine", choices=["torch", "sglang"], help="engine that runs the model; overrides UPDRAFT_INFERENCE_ENGINE"
    )
    parser.add_argument(
        "--attach", metavar="URL", help="URL of a running SGLang server; overrides UPDRAFT_INFERENCE_ATTACH"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    prepare = commands.add_parser(
        "prepare-sglang",
        help="write the files that an SGLang server needs to start, then exit",
        description="Write Updraft's plugin for the server's PYTHONPATH and an initial draft for its"
        " --speculative-draft-model-path. UPDRAFT_INFERENCE_MODEL names the target model. Files that are already correct"
        " are not changed.",
    )
    prepare.add_argument(
        "--plugin-dir", type=Path, required=True, metavar="DIR", help="where to write Updraft's plugin"
    )
    prepare.add_argument("--seed", type=Path, required=True, metavar="DIR", help="where to write the initial draft")
    prepare.add_argument(
        "--admin-key-file",
        type=Path,
        metavar="FILE",
        help="where to write a random admin key, as YAML for the server's --config",
    )
    play = commands.add_parser(
        "self-play",
        help="let the model write and answer requests, and record them, then exit",
        description="Record requests that the model itself writes and answers. Requests that the folder holds are not made"
        " again. `updraft draft train` runs it.",
    )
    play.add_argument("--model", required=True, metavar="FOLDER", help="target model")
    play.add_argument("--recordings", type=Path, required=True, metavar="FOLDER", help="where to record")
    play.add_argument(
        "--requests", type=int, required=True, metavar="N", help="how many requests the folder should hold"
    )
    return parser


if __name__ == "__main__":
    main()
