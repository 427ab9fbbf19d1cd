"""Versions and traces at the width of an 8B target. See README.md in this folder."""

import argparse
import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bench import harness
from bench.harness import Line, Measurements
from bench.width import data_path, head, learning, versions, weights
from bench.width.data_path import CONTROL, PathRun
from bench.width.head import HeadRun
from bench.width.learning import LearningRun
from bench.width.traffic import Width
from bench.width.versions import VersionRun
from rich.console import RenderableType
from rich.table import Table

from updraft_cli import output, results

SEED = 17
MB, GB = 1e6, 1e9

VOCABULARY = 151_936
TOKENS_PER_S = 10_000.0
SHORTEST, LONGEST = 256, 4096
SECONDS = 300.0
PODS = 4
LEARNING_REQUESTS, LEARNING_TOKENS = 200, 2000
LEARNING_S = 3600.0
LONG_HIDDEN, LONG_TOKENS = 7168, 32_768
FAST = 2000.0
"""Tokens per second of a request whose end is all that is waited for."""

HEAD_HIDDEN = 512

LARGE_HIDDEN = 7168
"""Hidden size of DeepSeek-V3 and Kimi K2, whose drafts of 32,000 tokens have 2.1 GB."""

VERSION_S = 30.0
"""For 0.8 GB on one pod. Eight pods at once may take three times as long."""

REGISTRY_MB = 500

R = TypeVar("R", VersionRun, PathRun, LearningRun, HeadRun)
Row = tuple[str, str, Callable[[R], float]]


def _loops(*names: str) -> Iterator[Row[Any]]:
    """The longest standstills of some processes' loops; see standstill.py."""
    for name in names:
        yield f"loop of {name}, longest work in one go", "ms", partial(_longest, name, "own_ms")
        yield "  with waits for Python's lock, at most", "ms", partial(_longest, name, "held_ms")
        yield "  with waits for a core", "ms", partial(_longest, name, "late_ms")


def _longest(name: str, measure: str, run: VersionRun | PathRun) -> float:
    return float(getattr(run.longest[name], measure))


VERSION_ROWS: Sequence[Row[VersionRun]] = (
    ("published, and in use on all pods", "s", lambda run: run.seconds),
    ("  uploaded, checked, accepted", "s", lambda run: run.upload_s),
    ("weights", "MB", lambda run: run.weights_bytes / MB),
    ("sent by the registry", "MB", lambda run: run.sent_bytes / MB),
    ("registry's CPU time", "s", lambda run: run.registry_cpu_s),
    ("registry, peak resident", "MB", lambda run: run.registry_bytes / MB),
    ("largest pod, with the draft", "MB", lambda run: run.pod_bytes / MB),
    *_loops("registry", "pods"),
)

CAPTURED_ROW: Row[PathRun] = ("captured, in the second half", "/s", lambda run: run.captured_tokens_per_s)

PATH_ROWS: Sequence[Row[PathRun]] = (
    ("requests", "", lambda run: run.requests),
    ("tokens asked for", "/s", lambda run: run.tokens_per_s),
    CAPTURED_ROW,
    ("output tokens handed over", "", lambda run: run.handed_over),
    ("  stored", "", lambda run: run.stored),
    ("traces sent", "", lambda run: run.captured),
    ("  dropped or refused", "", lambda run: sum(run.lost_traces.values())),
    ("samples stored", "", lambda run: run.admitted),
    ("replay, read", "MB/s", lambda run: run.read_mb_per_s),
    ("  per second of processor time", "MB/s", lambda run: run.read_mb_per_cpu_s),
    ("  with decoding", "MB/s", lambda run: run.decoded_mb_per_s),
    ("trainer, peak resident", "MB", lambda run: run.trainer_bytes / MB),
    ("largest pod, peak resident", "MB", lambda run: run.pod_bytes / MB),
    ("cores used by the trainer", "", lambda run: run.cpu_s["trainer"]),
    ("cores used by the pods", "", lambda run: run.cpu_s["pods"]),
    *_loops("trainer", "registry", "pods", CONTROL),
)

LONG_ROWS = [row for row in PATH_ROWS if row is not CAPTURED_ROW]
"""The second half of one request takes milliseconds, in which no rate can be measured."""

HEAD_ROWS: Sequence[Row[HeadRun]] = (
    ("checkpoint", "GB", lambda run: run.checkpoint_bytes / GB),
    ("its three tensors", "MB", lambda run: run.tensors_bytes / MB),
    ("sent by the server", "MB", lambda run: run.sent_bytes / MB),
    ("  with a kill half-way", "MB", lambda run: run.sent_bytes_killed / MB),
    ("  on disk at the kill", "MB", lambda run: run.arrived_bytes / MB),
    ("fetched in", "s", lambda run: run.seconds),
)


def measure_versions(hidden: int, fleets: Sequence[int]) -> list[VersionRun]:
    """The first version, sent whole, and, for a single pod, its successor, sent as a delta."""

    async def roll_out(folder: Path, num_pods: int, drafts: Sequence[weights.DraftFile]) -> list[VersionRun]:
        async with versions.fleet(folder, num_pods) as fleet:
            return [await fleet.roll_out(draft) for draft in drafts]

    runs: list[VersionRun] = []
    with tempfile.TemporaryDirectory() as folder:
        drafts = [
            weights.write(Path(folder) / f"{number}.safetensors", hidden, seed=SEED, number=number) for number in (1, 2)
        ]
        for num_pods in fleets:
            with tempfile.TemporaryDirectory() as data:
                runs += asyncio.run(roll_out(Path(data), num_pods, drafts if num_pods == 1 else drafts[:1]))
    return runs


def measure_path(arguments: argparse.Namespace) -> PathRun:
    width = Width(hidden=arguments.hidden, vocabulary=VOCABULARY, tokens_per_s=arguments.tokens_per_s)
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(
            data_path.run(
                Path(folder),
                width,
                num_pods=PODS,
                seconds=arguments.seconds,
                shortest=SHORTEST,
                longest=LONGEST,
                seed=SEED,
            )
        )


def measure_long(arguments: argparse.Namespace) -> PathRun:
    """One request that is longer than any entry of the stream may be."""
    width = Width(
        hidden=arguments.long_hidden, vocabulary=VOCABULARY, tokens_per_s=TOKENS_PER_S, request_tokens_per_s=FAST
    )
    with tempfile.TemporaryDirectory() as folder:
        longest = arguments.long_tokens
        return asyncio.run(
            data_path.run(Path(folder), width, num_pods=1, seconds=0.0, shortest=longest, longest=longest, seed=SEED)
        )


def measure_head(arguments: argparse.Namespace) -> HeadRun:
    with tempfile.TemporaryDirectory() as folder:
        return head.run(Path(folder), arguments.head_hidden)


def measure_learning(arguments: argparse.Namespace) -> LearningRun:
    width = Width(hidden=arguments.hidden, vocabulary=VOCABULARY, tokens_per_s=TOKENS_PER_S, request_tokens_per_s=FAST)
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(
            learning.run(
                Path(folder),
                width,
                requests=LEARNING_REQUESTS,
                tokens=LEARNING_TOKENS,
                within_s=arguments.learning_seconds,
            )
        )


def learnt(run: LearningRun) -> str:
    """The result in words."""
    told = "\n".join(f"  {seconds:6.0f} s  {message}" for seconds, message in run.messages)
    if not run.version:
        return f"Nothing was published within {run.seconds:.0f} s. What status showed:\n{told}"
    return (
        f"Version {run.version} judged on {run.held_out} requests that it was not fitted to: {run.candidate_length:.2f} tokens"
        f" per verify step, without a draft {run.baseline_length:.2f}. That is {100 * run.learned_share:.0f} % of what can be"
        f" learned. It comes from {run.steps} optimizer steps. It learned to read the next token out of the states and to apply"
        f" a fixed permutation of 64 tokens, which is far easier than language. What status showed:\n{told}"
    )


LEARNING_ROWS: Sequence[Row[LearningRun]] = (
    ("published after", "s", lambda run: run.seconds),
    ("  requests answered", "", lambda run: run.requests),
    ("  requests stored", "", lambda run: run.stored),
    ("trainer: vocabulary and closed form", "s", lambda run: run.busy_s["vocabulary and closed form"]),
    ("  estimates", "s", lambda run: run.busy_s["estimates"]),
    ("  optimizer steps", "s", lambda run: run.busy_s["optimizer steps"]),
    ("  CPU time", "s", lambda run: run.trainer_cpu_s),
    ("trainer, peak resident", "GB", lambda run: run.trainer_bytes / GB),
    ("  without the mapped target", "GB", lambda run: run.anonymous_bytes / GB),
)


def table(runs: Sequence[R], rows: Sequence[Row[R]], name: Callable[[R], str]) -> Table:
    columns = output.table("", *(f">{name(run)}" for run in runs))
    for title, unit, figure in rows:
        columns.add_row(title, *(results.number(figure(run), unit) for run in runs))
    return columns


def _named(name: str, _run: object) -> str:
    return name


def version_bars(runs: Sequence[VersionRun]) -> list[Line]:
    limits = {1: VERSION_S, 8: 3 * VERSION_S}
    lines = [
        Line(results.at_most(f"0.8 GB in use on {run.pods} pods at once", run.seconds, limits[run.pods], "s"))
        for run in runs
        if run.version == 1 and run.pods in limits
    ]
    return [*lines, registry_bar(runs, "0.8 GB")]


def large_bars(runs: Sequence[VersionRun]) -> list[Line]:
    """As many seconds per byte as 0.8 GB."""
    return [
        *(
            Line(
                results.at_most(
                    f"{run.weights_bytes / GB:.1f} GB in use on a pod, sent {'whole' if run.version == 1 else 'as a delta'}",
                    run.seconds,
                    VERSION_S * run.weights_bytes / GB / 0.8,
                    "s",
                )
            )
            for run in runs
        ),
        registry_bar(runs, "2.1 GB"),
    ]


def registry_bar(runs: Sequence[VersionRun], size: str) -> Line:
    peak = max(run.registry_bytes for run in runs) / MB
    return Line(results.at_most(f"registry, peak resident, with {size}", peak, REGISTRY_MB, "MB"))


def path_bars(run: PathRun) -> list[Line]:
    bar = results.at_most
    return [
        Line(results.at_least("captured tokens", run.captured_tokens_per_s, TOKENS_PER_S, "/s")),
        Line(bar("output tokens handed over and not stored", run.lost, 0)),
        Line(bar("traces dropped or refused", sum(run.lost_traces.values()), 0), note=reasons(run)),
        Line(results.at_least("replay, read", run.read_mb_per_s, 500, "MB/s")),
        Line(bar("trainer without learner, peak resident", run.trainer_bytes / GB, 1.5, "GB")),
        Line(bar("pod, peak resident", run.pod_bytes / GB, 1.0, "GB")),
        Line(
            bar(
                "longest standstill of a loop",
                max(one.held_ms for name, one in run.longest.items() if name != CONTROL),
                20,
                "ms",
            ),
            note=f"an idle loop beside them {run.longest[CONTROL].held_ms:.1f} ms",
        ),
    ]


def reasons(run: PathRun) -> str:
    return ", ".join(f"{reason} {count:g}" for reason, count in run.lost_traces.items())


def long_bars(run: PathRun) -> list[Line]:
    return [
        Line(
            results.at_least(f"tokens stored of a request of {run.tokens:,}", run.stored, run.tokens), note=reasons(run)
        ),
        Line(results.at_most(f"agent, peak resident, with {run.tokens:,} tokens", run.pod_bytes / GB, 1.5, "GB")),
    ]


def head_bars(run: HeadRun) -> list[Line]:
    return [
        Line(results.at_most(f"{title}, over the tensors' bytes", sent / run.tensors_bytes, 1.1))
        for title, sent in (("fetched", run.sent_bytes), ("fetched, killed half-way", run.sent_bytes_killed))
    ]


def measure(arguments: argparse.Namespace) -> Measurements:
    figures: list[RenderableType] = []
    lines: list[Line] = []
    samples: list[dict[str, Any]] = []
    if "versions" in arguments.rows:
        runs = measure_versions(arguments.hidden, arguments.fleets)
        figures.append(table(runs, VERSION_ROWS, lambda run: f"{run.pods} pods, version {run.version}"))
        lines += version_bars(runs)
        samples += [asdict(run) for run in runs]
    if "large" in arguments.rows:
        runs = measure_versions(arguments.large_hidden, (1,))
        figures.append(table(runs, VERSION_ROWS, lambda run: f"D {arguments.large_hidden:,}, version {run.version}"))
        lines += large_bars(runs)
        samples += [asdict(run) for run in runs]
    if "fetch" in arguments.rows:
        fetched = measure_head(arguments)
        figures.append(table([fetched], HEAD_ROWS, lambda _: "fetch"))
        lines += head_bars(fetched)
        samples.append(asdict(fetched))
    paths = {
        name: act(arguments) for name, act in (("path", measure_path), ("long", measure_long)) if name in arguments.rows
    }
    if paths:
        rows = {"path": PATH_ROWS, "long": LONG_ROWS}
        figures += [table([run], rows[name], partial(_named, name)) for name, run in paths.items()]
        lines += path_bars(paths["path"]) if "path" in paths else []
        lines += long_bars(paths["long"]) if "long" in paths else []
        samples += [asdict(run) for run in paths.values()]
    if "learning" in arguments.rows:
        learning_run = measure_learning(arguments)
        figures += [table([learning_run], LEARNING_ROWS, lambda run: f"D {run.hidden:,}"), learnt(learning_run)]
        name = f"{LEARNING_REQUESTS} requests of {LEARNING_TOKENS:,} tokens, default settings: versions"
        lines.append(Line(results.at_least(name, learning_run.version, 1)))
        samples.append(asdict(learning_run))
    return Measurements(seed=SEED, lines=lines, samples=samples, figures=figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    rows = ("versions", "large", "fetch", "path", "long", "learning")
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, help="what to measure (default: all)")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size of the target")
    parser.add_argument("--fleets", type=int, nargs="+", default=(1, 8), help="numbers of pods that fetch a version")
    parser.add_argument("--large-hidden", type=int, default=LARGE_HIDDEN, help="hidden size for versions of 2 GB")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of the data path's run")
    parser.add_argument("--tokens-per-s", type=float, default=TOKENS_PER_S, help="captured tokens of all pods")
    parser.add_argument("--long-hidden", type=int, default=LONG_HIDDEN, help="hidden size for the long request")
    parser.add_argument("--long-tokens", type=int, default=LONG_TOKENS, help="tokens of the long request")
    parser.add_argument("--head-hidden", type=int, default=HEAD_HIDDEN, help="hidden size of the checkpoint of 230 GB")
    parser.add_argument("--learning-seconds", type=float, default=LEARNING_S, help="time limit for a publication")
    harness.run("width", parser, measure)


if __name__ == "__main__":
    main()
