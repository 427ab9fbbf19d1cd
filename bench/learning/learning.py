"""How fast does a draft learn from traffic, and what is each part of the algorithm worth? See README.md in this folder."""

import argparse
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import harness
from bench.code_digest import code_digest
from bench.learning import figures, streams
from bench.learning.arms import ARMS
from bench.learning.kinds import KEPT_OUT, KINDS, TUNED
from bench.learning.recorder import NUM_HELD_OUT, NUM_TRAINING, Recorder
from bench.learning.replay import LOOKAHEAD, Checkpoint, Replay, Run, traffic
from bench.learning.static import Split, converged, recipe
from bench.learning.streams import Stream
from rich.progress import Progress, TaskID

from updraft_cli import output, results
from updraft_cli.local.folders import cache_folder
from updraft_draft import checkpoint
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import read_head
from updraft_trainer.data.sample import Sample
from updraft_trainer.publishing.estimate import num_tokens, verify_steps

SEED = 7

CODE = ("bench.learning.replay", "bench.learning.static")
LEARNING = (
    "bench.learning.replay",
    "updraft_draft",
    "updraft_rollouts.evidence",
    "updraft_trainer.data",
    "updraft_trainer.learning",
    "updraft_trainer.publishing.decision",
    "updraft_trainer.publishing.estimate",
    "updraft_trainer.publishing.schedule",
)
"""The code that a run depends on: these modules, and what they import of these others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run, and how much was recorded for it."""

    arm: str
    stream: Stream
    seed: int
    num_training: int
    num_held_out: int

    def key(self, code: str, recordings: str) -> str:
        """Identifies all that the outcome depends on: `code` and `recordings` are digests."""
        content = [repr(ARMS[self.arm]), repr(self.stream), self.seed, torch.__version__, code, recordings]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def measure(arguments: argparse.Namespace) -> harness.Measurements:
    """Record what is missing, and run all jobs."""
    jobs = [
        Job(arm=arm, stream=stream, seed=SEED + n, num_training=arguments.training, num_held_out=arguments.held_out)
        for n in range(arguments.seeds)
        for stream in chosen_streams(arguments.streams, arguments.length or arguments.training)
        for arm in arguments.arms
    ]
    recorder = open_recorder()
    kinds = sorted({kind for job in jobs for kind in job.stream.kinds})
    recorder.record(kinds, arguments.training, arguments.held_out)
    prepare_static_drafts(recorder, jobs)
    ceilings = {kind: ceiling(recorder, kind, arguments) for kind in kinds} if arguments.converged else {}
    runs = run_all(recorder, jobs, arguments.processes)
    tokens = {
        kind: [num_tokens(one) for one in recorder.samples(kind, arguments.held_out, held_out=True)] for kind in kinds
    }
    return harness.Measurements(
        seed=SEED,
        lines=(),
        samples=[
            {"arm": job.arm, "stream": job.stream.name, "seed": job.seed, **dataclasses.asdict(outcome)}
            for job, outcome in runs.items()
        ],
        figures=[
            table(stream, {job: runs[job] for job in jobs if job.stream == stream}, tokens, ceilings)
            for stream in dict.fromkeys(job.stream for job in jobs)
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["ours", "shipped", "aurora", "osd"])
    parser.add_argument(
        "--streams",
        nargs="+",
        default=[f"scratch-{kind}" for kind in TUNED],
        metavar="STREAM",
        help=f"scratch-KIND, shift-KIND, ordered or drift; kinds: {', '.join(KINDS)}",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--training", type=int, default=NUM_TRAINING, help="recorded requests of each kind to learn from"
    )
    parser.add_argument(
        "--length", type=int, help="requests of a stream from each kind; as many as --training by default"
    )
    parser.add_argument(
        "--held-out", type=int, default=NUM_HELD_OUT, help="recorded requests of each kind to measure on"
    )
    parser.add_argument(
        "--converged",
        action="store_true",
        help="also compare with a draft that is trained on each kind until it has converged",
    )
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    harness.run("learning", parser, measure)


def chosen_streams(names: Iterable[str], length: int) -> list[Stream]:
    """The streams of these names."""
    made = []
    for name in names:
        form, _, kind = name.partition("-")
        if form in {"scratch", "shift"} and kind in KINDS:
            made.append(streams.scratch(kind, length) if form == "scratch" else streams.shift(kind, length))
        elif name == "ordered":
            made.append(streams.ordered(TUNED, length * len(TUNED)))
        elif name == "drift":
            made.append(streams.drift(TUNED, length * 2, SEED))
        else:
            sys.exit(f"there is no stream {name}; there are scratch-KIND, shift-KIND, ordered and drift")
    return made


def recordings() -> Path:
    """Where recorded answers are kept."""
    return cache_folder(os.environ) / "learning"


def open_recorder() -> Recorder:
    model = harness.model()
    return Recorder(model, recordings(), read_head(model))


def static_folder(without: str, num_training: int) -> Path:
    """Where the draft of all kinds but one is kept."""
    return recordings() / f"static-without-{without}-{num_training}-{recipe()}"


def static_samples(recorder: Recorder, without: str, num_training: int) -> list[Sample]:
    """The training samples of the draft of all kinds but one."""
    others = [kind for kind in TUNED if kind != without]
    return [sample for kind in others for sample in recorder.samples(kind, num_training, held_out=False)]


def ceiling(recorder: Recorder, kind: str, arguments: argparse.Namespace) -> list[int]:
    """Verify steps of held-out requests by a draft that has converged on all training requests of their kind."""
    folder = recordings() / f"static-of-{kind}-{arguments.training}-{recipe()}"
    draft = static_draft(recorder.samples(kind, arguments.training, held_out=False), folder, f"converged on {kind}")
    return verify_steps(draft, recorder.samples(kind, arguments.held_out, held_out=True), lookahead=LOOKAHEAD)


def static_draft(samples: Sequence[Sample], folder: Path, name: str) -> DraftNetwork:
    """Train it if it is missing, with progress."""
    with Progress() as progress:
        bar = progress.add_task(f"static draft {name}")
        report = functools.partial(_report, progress, bar)
        return converged(samples, read_head(harness.model()), folder, report)


def _report(progress: Progress, bar: TaskID, done: int, total: int) -> None:
    progress.update(bar, completed=done, total=total)


def prepare_static_drafts(recorder: Recorder, jobs: Sequence[Job]) -> None:
    """Train those that are missing."""
    for without in sorted({job.stream.static_without for job in jobs} - {""}):
        num_training = jobs[0].num_training
        recorder.record([kind for kind in TUNED if kind != without], num_training, jobs[0].num_held_out)
        samples = static_samples(recorder, without, num_training)
        static_draft(samples, static_folder(without, num_training), f"without {without}")


def run_all(recorder: Recorder, jobs: Sequence[Job], processes: int) -> dict[Job, Run]:
    """Each job once; those that have been run before, by code that learns alike, are read."""
    code = code_digest(CODE, LEARNING)
    paths = {job: runs_folder() / f"{job.key(code, recordings_digest(recorder, job))}.json" for job in jobs}
    with (
        Progress() as progress,
        ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        bar = progress.add_task("runs", total=len(jobs))
        futures = {pool.submit(run, job, paths[job]): job for job in jobs}
        runs = {}
        for future in as_completed(futures):
            runs[futures[future]] = future.result()
            progress.advance(bar)
    return {job: runs[job] for job in jobs}


def runs_folder() -> Path:
    """Where runs are kept, beside the recordings that they were fed with."""
    return recordings() / "runs"


def recordings_digest(recorder: Recorder, job: Job) -> str:
    """Identifies the recorded requests of a run, and the draft that it starts from."""
    found = hashlib.sha256()
    old = [kind for kind in TUNED if job.stream.static_without and kind != job.stream.static_without]
    for kind in sorted({*job.stream.order, *old}):
        found.update(recorder.digest(kind, job.num_training, held_out=False))
    for kind in job.stream.kinds:
        found.update(recorder.digest(kind, job.num_held_out, held_out=True))
    if old:
        found.update((static_folder(job.stream.static_without, job.num_training) / checkpoint.WEIGHTS).read_bytes())
    return found.hexdigest()


def run(job: Job, path: Path) -> Run:
    """In a process of its own, on one thread. Its outcome is kept in `path`."""
    if path.exists():
        return read(path)
    torch.set_num_threads(1)
    recorder, target = open_recorder(), read_head(harness.model())
    training = {kind: recorder.samples(kind, job.num_training, held_out=False) for kind in set(job.stream.order)}
    held_out = {kind: recorder.samples(kind, job.num_held_out, held_out=True) for kind in job.stream.kinds}
    replay = Replay(ARMS[job.arm], target, held_out, seed=job.seed)
    if job.stream.static_without:
        old = static_samples(recorder, job.stream.static_without, job.num_training)
        folder = static_folder(job.stream.static_without, job.num_training)
        learned, _, judging = Split.of(old)
        replay.start_from(converged(old, target, folder, lambda *_: None), learned, judging)
    outcome = replay.run(traffic(job.stream, training, job.seed), lambda _: None)
    write(outcome, job, path)
    return outcome


def write(outcome: Run, job: Job, path: Path) -> None:
    """One file, whole or not there; it also says for a person which run it is, and at which commit it was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"arm": job.arm, "stream": job.stream.name, "seed": job.seed, "commit": results.commit()}
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(made | dataclasses.asdict(outcome)))
    part.rename(path)


def read(path: Path) -> Run:
    """A run that was written before."""
    data: dict[str, Any] = json.loads(path.read_text())
    return Run(
        checkpoints=tuple(Checkpoint(**checkpoint) for checkpoint in data["checkpoints"]),
        published=tuple(data["published"]),
        online=tuple(data["online"]),
        sampled=data["sampled"],
        looks=tuple((requests, sentence) for requests, sentence in data["looks"]),
    )


def table(
    stream: Stream,
    runs: Mapping[Job, Run],
    tokens: Mapping[str, Sequence[int]],
    ceilings: Mapping[str, Sequence[int]],
) -> Any:
    """Acceptance length of each arm and kind at each checkpoint, over all seeds. `ceilings`: see `ceiling`."""
    by_arm: dict[str, list[Run]] = {}
    for job, outcome in runs.items():
        by_arm.setdefault(job.arm, []).append(outcome)
    first = next(iter(runs.values()))
    counts, is_shift = [f">{one.requests}" for one in first.checkpoints], bool(stream.static_without)
    against_first = (">last / first", ">lowest / first") if is_shift else ()
    of_converged = (">surplus of converged",) if ceilings else ()
    rows = output.table(
        "arm",
        "kind",
        *counts,
        *against_first,
        *of_converged,
        ">least kept",
        ">first gain",
        ">accepted at t=1",
        ">seconds",
    )
    rows.title = (
        f"{stream.name}: tokens per verify step after so many requests ({len(by_arm[next(iter(by_arm))])} seeds)"
    )
    for kind in stream.kinds:
        for arm, outcomes in by_arm.items():
            steps = [[one.checkpoints[n].steps[kind] for one in outcomes] for n in range(len(first.checkpoints))]
            gains = [gain for one in outcomes if (gain := figures.first_gain(one, kind, tokens[kind]))]
            rows.add_row(
                arm,
                f"{kind}{'*' if kind in KEPT_OUT else ''}",
                *(str(figures.acceptance_length(tokens[kind], one)) for one in steps),
                *(
                    (str(figures.relative(steps[-1], steps[0])), str(figures.lowest_of_first(steps)))
                    if is_shift
                    else ()
                ),
                *((str(figures.surplus(tokens[kind], steps[-1], [ceilings[kind]])),) if ceilings else ()),
                str(figures.least_kept(steps)),
                str(max(gain[0] for gain in gains)) if len(gains) == len(outcomes) else "-",
                str(figures.mean([one.sampled[kind] for one in outcomes]))
                if all(one.sampled for one in outcomes)
                else "-",
                f"{sum(one.checkpoints[-1].seconds for one in outcomes) / len(outcomes):.0f}",
            )
    return rows


if __name__ == "__main__":
    main()
