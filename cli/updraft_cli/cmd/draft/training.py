"""`draft train`: a first draft from requests that the target answers now, or from traces that were recorded before.

The engine and the trainer do the work as processes of their own, because the command line has no torch. Both may be killed at
any time: what they keep appears by a rename.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from google.protobuf import json_format

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import Conflict, InvalidInput
from updraft_cli.backends.wire import draft_details
from updraft_cli.cmd.draft import parts, view
from updraft_rollouts.evidence import MIN_KIND_SAMPLES, Paired, gain

MIN_REQUESTS, MAX_REQUESTS = 24, 1000
"""Bounds of --self-play. The trainer needs 16 different prompts, and some may be alike or cut off. More than 1,000 hardly
help."""

_CONFIDENCE = 0.9
_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """As given; `recordings` is None for the default."""

    target: Path
    prompts: Path | None
    traces: Sequence[Path]
    self_play: int | None
    output: Path
    recordings: Path | None
    max_tokens: int
    temperature: float
    seed: int
    context: int
    epochs: int
    region: str
    threads: int | None

    @property
    def folder(self) -> Path:
        return self.output.absolute()

    @property
    def recorded(self) -> Path | None:
        """The folder for answered requests; None if there is none to answer."""
        if not (self.prompts or self.self_play):
            return None
        return (self.recordings or self.folder.with_name(f"{self.folder.name}-recordings")).absolute()

    @property
    def origin(self) -> str:
        """The sources of the draft's training, in words."""
        sources = [
            *([f"answers to {self.prompts.name}"] if self.prompts else []),
            *(f"traces of {folder}" for folder in self.traces),
            *([f"{self.self_play} requests of self-play"] if self.self_play else []),
        ]
        return ", ".join(sources)

    def recording(self) -> list[object]:
        """The arguments of `updraft-inference record`."""
        words: list[object] = ["record", "--model", self.target, "--recordings", self.recorded]
        words += ["--prompts", self.prompts] if self.prompts else []
        words += ["--self-play", self.self_play] if self.self_play else []
        words += ["--max-tokens", self.max_tokens, "--temperature", self.temperature]
        return [*words, "--seed", self.seed, "--context", self.context]

    def learning(self) -> list[object]:
        """The arguments of `updraft-trainer offline`."""
        folders = [*([self.recorded] if self.recorded else []), *self.traces]
        words: list[object] = ["offline", "--model", self.target, "--output", self.folder]
        words += [word for folder in folders for word in ("--traces", folder)]
        return [*words, "--epochs", self.epochs, "--origin", self.origin, "--region", self.region]


@click.command()
@click.option(
    "--target",
    metavar="MODEL",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="The target model: a folder in Hugging Face layout.",
)
@click.option(
    "--prompts",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Prompts in JSON Lines, which the model answers.",
)
@click.option(
    "--traces",
    metavar="FOLDER",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    help="Folder of recorded requests: a trainer's data, or recordings of this command. Repeatable.",
)
@click.option(
    "--self-play",
    metavar="N",
    type=click.IntRange(MIN_REQUESTS, MAX_REQUESTS),
    help="Number of requests that the model writes and answers.",
)
@click.option(
    "--output",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="A new folder for the draft.",
)
@click.option(
    "--recordings",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for answered requests; those that it holds are not made again, and all are learned from."
    "  [default: FOLDER-recordings]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(2),
    default=256,
    show_default=True,
    help="Tokens of an answer to a prompt, at most.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=0.0,
    show_default=True,
    help="Temperature of answers to prompts; 0 takes the likeliest token.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of answers to prompts at a temperature.")
@click.option(
    "--context",
    type=click.IntRange(16),
    default=2048,
    show_default=True,
    help="Tokens of a prompt with its answer, at most; longer prompts are left out.",
)
@click.option(
    "--epochs", type=click.IntRange(1), default=4, show_default=True, help="How often each request is trained on."
)
@click.option(
    "--region",
    metavar="NAME",
    default="",
    help="Region of this machine. Traces that may be stored only in another one are left out.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads to use.  [default: chosen by torch]")
def train(**given: Any) -> None:
    """Train a first draft, without a registry.

    The draft learns from requests of any of three sources: --prompts and --self-play let the model answer now, --traces takes
    what was recorded before. One request of eight is held out and judges the draft. Ctrl-C stops the command; the same
    command goes on from there.

    A line of --prompts is a JSON object: {"prompt": "..."}, {"messages": [...]} as in OpenAI's API, or {"conversations":
    [...]} as in ShareGPT. The model answers the last message of the user.

    \b
    updraft draft train --target MODEL --prompts questions.jsonl --output day0
    updraft draft train --target MODEL --traces ~/.local/share/updraft --output day0
    updraft draft train --target MODEL --self-play 400 --output day0
    updraft draft import day0
    """
    options = _Options(**given)
    if not (options.recorded or options.traces):
        raise click.UsageError("Name what to learn from: --prompts, --traces or --self-play.")
    if options.recordings and not options.recorded:
        raise click.UsageError("--recordings needs --prompts or --self-play; to learn from a folder, use --traces.")
    _check_empty(options.folder)
    for place in (options.folder.parent, options.recorded):
        if place is not None:
            _check_writable(place)
    environment = {} if options.threads is None else {"OMP_NUM_THREADS": str(options.threads)}
    try:
        if options.recorded:
            parts.run("inference", options.recording(), environment)
        parts.run("trainer", options.learning(), environment)
    except KeyboardInterrupt:
        click.echo("Stopped. The same command goes on from there.", err=True)
        raise SystemExit(_INTERRUPTED) from None
    click.echo(_summary(options.folder))


def _check_empty(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise Conflict(f"{folder} is not empty: name a new folder with --output")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidInput(f"cannot write to {folder}: {error.strerror or error}") from error


def _summary(folder: Path) -> str:
    from updraft_artifacts.transfer import MANIFEST  # noqa: PLC0415 - needs numpy, as in registry_commands

    manifest = json_format.Parse((folder / MANIFEST).read_text(), pb.Manifest())
    details, step = draft_details(pb.Version(manifest=manifest)), manifest.provenance.step
    how = f"in {step:,} optimizer steps" if step else "in closed form"
    return (
        f"{folder} holds a draft, from {manifest.provenance.samples:,} requests {how}.\n"
        f"{view.offline(details.evaluation)}{_interval(manifest.evaluation)}\n"
        f"Publish it with: updraft draft import {folder}"
    )


def _interval(evaluation: pb.Evaluation) -> str:
    pairs = [
        Paired(tokens=one.tokens, candidate_steps=one.candidate_steps, baseline_steps=one.baseline_steps)
        for one in evaluation.samples
    ]
    if len(pairs) < MIN_KIND_SAMPLES:
        return ""
    found = gain(pairs, _CONFIDENCE)
    return f"; {found.low_percent:.0f} to {found.high_percent:.0f} % more, with {100 * _CONFIDENCE:.0f} % confidence"
