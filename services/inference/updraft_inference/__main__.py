"""`updraft-inference`: one pod of a speculator, set up by UPDRAFT_INFERENCE_* variables, of which two are arguments too."""

import argparse
import os
from pathlib import Path

from updraft_chassis import lifecycle

_ARGUMENTS = ("engine", "attach")
"""Those that say what is started."""


def main() -> None:
    """Serve until SIGTERM or SIGINT, or prepare what an SGLang server needs."""
    lifecycle.while_importing()
    arguments = _parser().parse_args()
    from updraft_inference import process  # noqa: PLC0415 - takes seconds

    if arguments.command == "prepare-sglang":
        process.prepare_sglang(
            os.environ, plugin=arguments.plugin_dir, seed=arguments.seed, key_file=arguments.admin_key_file
        )
        return
    said = {f"UPDRAFT_INFERENCE_{name.upper()}": getattr(arguments, name) for name in _ARGUMENTS}
    process.main(os.environ | {name: value for name, value in said.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="updraft-inference",
        description="Serve a model with a draft that keeps learning. Settings are UPDRAFT_INFERENCE_* variables.",
    )
    parser.add_argument(
        "--engine", choices=["torch", "sglang"], help="what runs the model; over UPDRAFT_INFERENCE_ENGINE"
    )
    parser.add_argument("--attach", metavar="URL", help="an SGLang server that runs; over UPDRAFT_INFERENCE_ATTACH")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    prepare = commands.add_parser(
        "prepare-sglang",
        help="write what an SGLang server starts with, and end",
        description="Write the folder for the server's PYTHONPATH and the draft for its --speculative-draft-model-path,"
        " for the model of UPDRAFT_INFERENCE_MODEL. What is there and right is left alone.",
    )
    prepare.add_argument("--plugin-dir", type=Path, required=True, metavar="DIR", help="gets Updraft's plugin")
    prepare.add_argument("--seed", type=Path, required=True, metavar="DIR", help="gets the first draft")
    prepare.add_argument(
        "--admin-key-file", type=Path, metavar="FILE", help="gets a random admin key, for the server's --config (.yaml)"
    )
    return parser


if __name__ == "__main__":
    main()
