"""Shared by all benchmarks: the entry point, the result file, the printed tables, arms in turn, and concurrent requests."""

import argparse
import asyncio
import os
import shlex
import statistics
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from rich.console import RenderableType
from rich.text import Text

from updraft_cli import output, results
from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import model_folder
from updraft_kernels.loader import supported_variants

S = TypeVar("S")
T = TypeVar("T")

FOLDER = Path("bench/results")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The quartiles of `count` values."""

    low: float
    median: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{results.number(self.low)} to {results.number(self.high)} ({self.count})"


@dataclass(frozen=True, slots=True)
class Line:
    """A bar, the quartiles of its figure, and the figures behind it."""

    bar: results.Bar
    spread: Spread | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """The outcome of a benchmark. `figures` are the tables and texts to print above the bars."""

    seed: int
    lines: Sequence[Line]
    samples: list[dict[str, Any]]
    figures: Sequence[RenderableType] = ()


def run(name: str, parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], Measurements]) -> None:
    """The entry point of `make bench-<name>`. Exits with 1 if a bar is missed."""
    arguments, started = parser.parse_args(), datetime.now(UTC)
    try:
        measurements = measure(arguments)
    except KeyboardInterrupt:
        sys.exit(f"bench-{name} was interrupted. Nothing was written.")
    sys.exit(report(name, started, measurements))


def report(name: str, started: datetime, measurements: Measurements) -> str | None:
    """Print the tables and write the result file. Return a sentence about the missed bars, if any."""
    arguments = f" ARGS={shlex.quote(shlex.join(sys.argv[1:]))}" if sys.argv[1:] else ""
    result = results.Result(
        name=name,
        command=f"make bench-{name}{arguments}",
        started=started,
        commit=results.commit(),
        seed=measurements.seed,
        machine=results.machine(),
        bars=tuple(line.bar for line in measurements.lines),
        samples=measurements.samples,
    )
    console = output.console()
    console.print(_title(result))
    for figures in (*measurements.figures, _bars(measurements.lines)):
        console.print(figures)
    console.print(f"Samples: {results.write(result, FOLDER)}")
    return results.missed(result.bars)


def _title(result: results.Result) -> str:
    machine = result.machine
    simd = next(iter(supported_variants()), "no")
    return (
        f"{result.command} (commit {result.commit or 'unknown'}, {result.started:%Y-%m-%d %H:%M} UTC)\n"
        f"{machine.processor}, {machine.cores} cores, {simd} SIMD, {machine.memory_gb:g} GB, {machine.system},"
        f" Python {machine.python}, torch {machine.torch or 'not installed'}"
    )


def _bars(lines: Sequence[Line]) -> RenderableType:
    quartiles = ">quartiles" if any(line.spread for line in lines) else ""
    table = output.table("", "~bar", ">measured", quartiles, ">target", "")
    for line in lines:
        bar = line.bar
        table.add_row(
            Text(results.MARKS[bar.met], "bold green" if bar.met else "bold red"),
            bar.name,
            results.number(bar.measured, bar.unit),
            str(line.spread or ""),
            f"{bar.relation} {results.number(bar.target, bar.unit)}",
            line.note,
        )
    return table


def positive(text: str) -> int:
    """An argument of a command: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def spread(values: Iterable[float]) -> Spread | None:
    """Quartiles; None if there are no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    low, median, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return Spread(low=low, median=median, high=high, count=len(ordered))


def p95(values: Sequence[float]) -> float:
    """The 95th percentile."""
    return statistics.quantiles(values, n=20)[-1] if len(values) > 1 else values[0]


def in_turn(arms: Sequence[T], round_: int) -> Iterator[T]:
    """The arms of a round. Each round starts with another one, so that disturbances fall on all of them."""
    return (arms[(round_ + n) % len(arms)] for n in range(len(arms)))


async def concurrently(items: Iterable[S], limit: int, act: Callable[[int, S], Awaitable[T]]) -> list[T]:
    """Call `act` with the number and the value of each item, `limit` at a time. Returns the outcomes in the items' order."""
    outcomes: dict[int, T] = {}
    remaining = iter(enumerate(items))

    async def stream() -> None:
        for number, item in remaining:
            outcomes[number] = await act(number, item)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(limit):
            tasks.create_task(stream())
    return [outcomes[number] for number in sorted(outcomes)]


def model() -> Path:
    """The folder of SmolLM2-135M, which the benchmarks serve."""
    return model_folder(cache_folder(os.environ))
