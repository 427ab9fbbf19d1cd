"""`updraft-inference`: one pod of a speculator. UPDRAFT_INFERENCE_* variables configure it; two of them are also arguments."""

import argparse
import os
from pathlib import Path

from updraft_chassis import lifecycle

_ARGUMENTS = ("engine", "attach")
"""Settings that can also be passed as arguments."""


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.command == "record":
        lifecycle.let_signals_kill()
    else:
        lifecycle.while_importing()
    from updraft_inference import process  # noqa: PLC0415 - takes seconds

    if arguments.command == "prepare-sglang":
        process.prepare_sglang(
            os.environ, plugin=arguments.plugin_dir, seed=arguments.seed, key_file=arguments.admin_key_file
        )
        return
    if arguments.command == "prepare-vllm":
        process.prepare_vllm(os.environ, plugin=arguments.plugin_dir, seed=arguments.seed)
        return
    if arguments.command == "record":
        _record(arguments)
        return
    overrides = {f"UPDRAFT_INFERENCE_{name.upper()}": getattr(arguments, name) for name in _ARGUMENTS}
    process.main(os.environ | {name: value for name, value in overrides.items() if value is not None})


def _record(arguments: argparse.Namespace) -> None:
    from updraft_inference import process  # noqa: PLC0415 - see main
    from updraft_inference.recording.options import AnswerOptions, RecordOptions  # noqa: PLC0415

    with lifecycle.errors_as_sentences(process.PROCESS):
        answers = AnswerOptions(
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            max_context=arguments.context,
        )
    options = RecordOptions(
        model=arguments.model,
        folder=arguments.recordings,
        num_self_play=arguments.self_play,
        prompts=arguments.prompts,
        answers=answers,
    )
    process.record(os.environ, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="updraft-inference",
        description="Serve a model with a draft model that keeps learning. Configure it with UPDRAFT_INFERENCE_* variables.",
    )
    parser.add_argument(
        "--engine",
        choices=["torch", "sglang", "vllm"],
        help="engine that runs the model; overrides UPDRAFT_INFERENCE_ENGINE",
    )
    parser.add_argument(
        "--attach", metavar="URL", help="URL of an SGLang server with several ranks; overrides UPDRAFT_INFERENCE_ATTACH"
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
    beside = commands.add_parser(
        "prepare-vllm",
        help="write the files that a vLLM server needs to start, then exit",
        description="Write Updraft's plugin for the server's PYTHONPATH and, with --seed, an initial draft for its"
        " --speculative-config. UPDRAFT_INFERENCE_MODEL names the target model. Files that are already correct are not"
        " changed.",
    )
    beside.add_argument("--plugin-dir", type=Path, required=True, metavar="DIR", help="where to write Updraft's plugin")
    beside.add_argument("--seed", type=Path, metavar="DIR", help="where to write an initial draft")
    _add_record(
        commands.add_parser(
            "record",
            help="answer prompts, or let the model write them, and record the requests, then exit",
            description="Answer requests and record them with hidden states. Requests that the folder holds are not made again."
            " `updraft draft train` runs it.",
        )
    )
    return parser


def _add_record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="target model")
    parser.add_argument("--recordings", type=Path, required=True, metavar="FOLDER", help="where to record")
    parser.add_argument(
        "--self-play", type=int, default=0, metavar="N", help="number of requests that the model writes"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts to answer, in JSON Lines")
    parser.add_argument("--max-tokens", type=int, required=True, metavar="N", help="longest answer to a prompt")
    parser.add_argument(
        "--temperature", type=float, required=True, metavar="T", help="of answers to prompts; 0 is greedy"
    )
    parser.add_argument("--seed", type=int, required=True, metavar="N", help="of sampled answers to prompts")
    parser.add_argument(
        "--context", type=int, required=True, metavar="N", help="longest prompt with its answer, in tokens"
    )


if __name__ == "__main__":
    main()
