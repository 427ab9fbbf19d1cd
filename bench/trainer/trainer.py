"""Measures memory and time of a training step, and checks that it is exact. See README.md in this folder."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench import harness
from bench.harness import Line, Measurements
from bench.trainer import costs, ranks, recordings, speculators_environment
from bench.trainer.exactness import worst_error
from bench.width.learning import write_target
from bench.width.traffic import Width
from rich.console import RenderableType
from rich.text import Text

from updraft_cli import output, results

BASELINE = "347e807"
"""The last commit whose learner had T x T masks, padded batches and one dense tensor of logits per chunk of 256 rows."""

ROOTS = (
    "proto",
    "libs/chassis",
    "libs/artifacts",
    "libs/rollouts",
    "libs/draft",
    "services/inference",
    "services/trainer",
    "cli",
)

MEMORY = {"long": (8_192, 1_024, 6.0), "longest": (32_768, 512, 8.0)}
"""Tokens, hidden size and the bar in GB."""

REPOSITORY = Path(__file__).parents[2]


@dataclass(slots=True)
class Figures:
    """Measurements of one part."""

    lines: list[Line] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    table: RenderableType | None = None


def main() -> None:
    parser = argparse.ArgumentParser()
    parts = ["exactness", "memory", "speed", "speculators", "costs", "ranks", "save"]
    parser.add_argument("--only", choices=parts, nargs="+", default=parts)
    parser.add_argument("--shapes", choices=list(MEMORY), nargs="+", default=list(MEMORY))
    parser.add_argument("--teachers", choices=["hidden", "top-k"], nargs="+", default=["hidden", "top-k"])
    parser.add_argument("--baseline", default=BASELINE, help="commit to compare with; empty: none")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    harness.run("trainer", parser, measure)


def measure(arguments: argparse.Namespace) -> Measurements:
    parts = {
        "exactness": _exactness,
        "memory": _memory,
        "speed": _speed,
        "speculators": _speculators,
        "costs": _costs,
        "ranks": _ranks,
        "save": _save,
    }
    with tempfile.TemporaryDirectory() as scratch:
        done = [part(arguments, Path(scratch)) for name, part in parts.items() if name in arguments.only]
    return Measurements(
        seed=0,
        lines=[line for one in done for line in one.lines],
        samples=[sample for one in done for sample in one.samples],
        figures=[one.table for one in done if one.table is not None],
    )


def _exactness(_: argparse.Namespace, scratch: Path) -> Figures:
    errors = {num_steps: worst_error(scratch / f"tiny-{num_steps}", num_steps) for num_steps in range(1, 8)}
    name = "largest relative error of loss and gradients in float32, TTT 1 to 7"
    return Figures(lines=[Line(results.at_most(name, max(errors.values()), 1e-5))], samples=[{"exactness": errors}])


def _memory(arguments: argparse.Namespace, scratch: Path) -> Figures:
    table = output.table("one step of one sequence, 5 draft steps, V_d 32,000", ">peak RSS", ">seconds", "outcome")
    figures = Figures(table=table)
    for shape in arguments.shapes:
        tokens, hidden, most_gb = MEMORY[shape]
        target = write_target(scratch / f"target-{hidden}", Width(hidden=hidden, vocabulary=32_000, tokens_per_s=1.0))
        for commit, teacher, recompute in _arms(arguments):
            with _roots(commit, scratch) as roots:
                run = _long_sample(roots, target, tokens, teacher, recompute=recompute)
            name = f"T {tokens:,}, D {hidden:,}, {teacher}{', recompute' if recompute else ''}"
            table.add_row(
                Text(f"{commit or 'this commit'}: {name}"),
                f"{run['peak_gb']:.2f} GB",
                f"{run['seconds']:.0f}",
                Text(run["died"] or "done"),
            )
            figures.samples.append({"memory": name, "commit": commit, **run})
            if not commit and not recompute:
                peak = None if run["died"] else run["peak_gb"]
                figures.lines.append(Line(results.at_most(f"peak RSS, {name}", peak, most_gb, "GB"), note=run["died"]))
    return figures


def _arms(arguments: argparse.Namespace) -> Iterator[tuple[str, str, bool]]:
    """Commit, teacher and whether inner values are computed again."""
    for teacher in arguments.teachers:
        yield "", teacher, False
    yield "", arguments.teachers[0], True
    if arguments.baseline:
        yield arguments.baseline, arguments.teachers[0], False


def _long_sample(roots: str, target: Path, tokens: int, teacher: str, *, recompute: bool) -> dict[str, Any]:
    options = ["--target", str(target), "--tokens", str(tokens), "--teacher", teacher]
    process = subprocess.run(
        _command(*options, *(["--recompute"] if recompute else [])),
        env=_environment(roots),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = process.stdout.splitlines()
    if process.returncode or not lines:
        raise RuntimeError(f"the worker ended with {process.returncode}: {process.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def _speed(arguments: argparse.Namespace, scratch: Path) -> Figures:
    commits = ["", *([arguments.baseline] if arguments.baseline else [])]
    steps: dict[str, list[dict[str, Any]]] = {commit: [] for commit in commits}
    options = _options(arguments, scratch)
    with _roots("", scratch) as ours, _roots(arguments.baseline, scratch) as theirs:
        workers = [_worker(roots, options) for roots in (ours, theirs)[: len(commits)]]
        for number in range(2 + arguments.rounds):
            for commit, worker in zip(commits, workers, strict=True):
                step = _step(worker, number % arguments.rounds)
                steps[commit] += [step] if number >= 2 else []
        for worker in workers:
            worker.terminate()
            worker.wait()
    rates = {
        commit or "this commit": harness.spread(one["tokens"] / one["seconds"] for one in of_commit)
        for commit, of_commit in steps.items()
    }
    table = output.table(
        f"SmolLM2's recorded answers, 4 a step, {arguments.threads} threads", ">tokens/s", ">quartiles"
    )
    for name, rate in rates.items():
        if rate is not None:
            table.add_row(name, f"{rate.median:,.0f}", str(rate))
    samples = [{"speed": commit, **step} for commit, of_commit in steps.items() for step in of_commit]
    figures = Figures(samples=samples, table=table)
    if arguments.baseline:
        pairs = zip(steps[""], steps[arguments.baseline], strict=True)
        ratio = harness.spread(other["seconds"] / one["seconds"] for one, other in pairs)
        assert ratio is not None, "there are rounds"
        bar = results.at_least(f"tokens per second over those of {arguments.baseline}", ratio.median, 1.5, "x")
        figures.lines.append(Line(bar, ratio))
    return figures


def _speculators(arguments: argparse.Namespace, scratch: Path) -> Figures:
    """Our learner and the package's model, in turn on the same batches."""
    with _roots("", scratch) as roots:
        theirs = [str(speculators_environment.python()), str(Path(__file__).with_name("speculators_worker.py"))]
        options = _options(arguments, scratch)
        workers = [_worker(roots, options), _worker(roots, options, theirs)]
        steps: list[list[dict[str, Any]]] = [[], []]
        for number in range(1 + arguments.rounds):
            for worker, of_worker in zip(workers, steps, strict=True):
                step = _step(worker, number % arguments.rounds)
                of_worker.extend([step] if number else [])
        for worker in workers:
            worker.terminate()
            worker.wait()
    ratio = harness.spread(other["seconds"] / one["seconds"] for one, other in zip(*steps, strict=True))
    assert ratio is not None, "there are rounds"
    name = f"tokens per second over those of speculators {speculators_environment.VERSION}"
    samples = [
        {"speculators": who, **step} for who, of_one in zip(("ours", "theirs"), steps, strict=True) for step in of_one
    ]
    return Figures(lines=[Line(results.at_least(name, ratio.median, 1.0, "x"), ratio)], samples=samples)


def _costs(arguments: argparse.Namespace, _: Path) -> Figures:
    """Costs of options and kernels, in ratios of medians."""
    table = output.table(f"costs, {arguments.threads} threads", ">ratio", "of")
    figures = costs.measure(arguments.threads, arguments.rounds)
    for cost in figures:
        table.add_row(cost.name, f"{cost.ratio:.2f}", cost.of)
    return Figures(samples=[{"cost": asdict(cost)} for cost in figures], table=table)


def _ranks(arguments: argparse.Namespace, scratch: Path) -> Figures:
    """Two ranks with one thread each, and one process with one thread."""
    table = output.table("two ranks over one, one thread each", ">tokens per second", ">quartiles")
    with _roots("", scratch) as roots:
        command = _command(*_options(arguments, scratch), "--threads", "1")
        compared = ranks.measure(command, _environment(roots), arguments.rounds)
    for arm, ratio in compared.ratios.items():
        table.add_row(arm, f"{ratio.median:.2f}x", str(ratio))
    ratio = compared.ratios[ranks.ARMS[0]]
    bar = results.at_least(f"tokens per second of two ranks over one, {ranks.ARMS[0]}", ratio.median, 1.7, "x")
    return Figures(lines=[Line(bar, ratio)], samples=compared.samples, table=table)


def _save(arguments: argparse.Namespace, scratch: Path) -> Figures:
    """The state of an 8B target's draft; the target's own vocabulary is small, because no state has it."""
    target = write_target(scratch / "target-save", Width(hidden=4_096, vocabulary=32_000, tokens_per_s=1.0))
    options = ["--target", str(target), "--folder", str(scratch / "states"), "--threads", str(arguments.threads)]
    command = [sys.executable, str(Path(__file__).with_name("saving.py")), *options]
    with _roots("", scratch) as roots:
        process = subprocess.run(command, env=_environment(roots), stdout=subprocess.PIPE, text=True, check=True)
    *saves, load = (json.loads(line) for line in process.stdout.splitlines())
    name = f"the state of a draft, D 4,096, V_d 32,000: {load['state_gb']:.2f} GB"
    table = output.table(name, ">seconds", ">of these training stands still", ">extra memory")
    for save in saves:
        pause_s = save.get("pause_s", save["seconds"])
        cells = (f"{save['seconds']:.1f}", f"{pause_s:.1f}", f"{save['extra_gb']:.2f} GB")
        table.add_row(Text(f"save, {save['save']}"), *cells)
    table.add_row(Text("load"), f"{load['load_s']:.1f}", "", "")
    return Figures(samples=[{"save": 0, **one} for one in (*saves, load)], table=table)


def _options(arguments: argparse.Namespace, scratch: Path) -> list[str]:
    """Options of a worker that trains on recorded batches, which are written for it."""
    file = scratch / "samples.pt"
    if not file.exists():
        # By length, because ranks take a step on neighbours, and the one with fewer tokens waits for the other.
        batches = sorted(recordings.recorded(arguments.rounds), key=lambda batch: sum(one.num_rows for one in batch))
        recordings.write(batches, file)
    return ["--target", str(harness.model()), "--samples", str(file), "--threads", str(arguments.threads)]


def _worker(roots: str, options: Sequence[str], program: Sequence[str] = ()) -> "subprocess.Popen[str]":
    command = [*program, *options] if program else _command(*options)
    worker = subprocess.Popen(
        command, env=_environment(roots), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    while (line := worker.stdout.readline().strip()) != "ready":
        if not line and worker.poll() is not None:
            raise RuntimeError(f"a learner ended with {worker.returncode} before its first step")
    return worker


def _step(worker: "subprocess.Popen[str]", number: int) -> dict[str, Any]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(number, file=worker.stdin, flush=True)
    figures: dict[str, Any] = json.loads(worker.stdout.readline())
    return figures


def _command(*options: str) -> Sequence[str]:
    return [sys.executable, str(Path(__file__).with_name("worker.py")), *options]


def _environment(roots: str) -> dict[str, str]:
    return dict(os.environ) | {"PYTHONPATH": roots}


@contextmanager
def _roots(commit: str, scratch: Path) -> Iterator[str]:
    """The import path of a commit's packages, with this checkout's benchmarks; an empty commit is this checkout."""
    folder = REPOSITORY
    if commit:
        folder = scratch / commit
        if not folder.exists():
            folder.mkdir()
            archive = subprocess.run(
                ["git", "archive", commit, *ROOTS], cwd=REPOSITORY, capture_output=True, check=True
            )
            subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
            _copy_kernels(folder)
    yield ":".join([*(str(folder / root) for root in ROOTS), str(REPOSITORY)])


def _copy_kernels(folder: Path) -> None:
    """The compiled kernels are not in the repository; loading a model's target does not need those of that commit."""
    place = "services/inference/updraft_kernels"
    for kernel in (REPOSITORY / place).glob("*.so"):
        (folder / place / kernel.name).symlink_to(kernel)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
