"""Is the built-in engine faster than its peers, and never slower than itself? See README.md here."""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from bench.serving import draft, figures, parts
from bench.serving.figures import NGRAM, OWN_TEXT, PARTS, PLAIN, Line, Part
from bench.serving.plan import FULL, QUICK, SEED
from bench.serving.workloads import Words
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from tests.vllm import build

from updraft_cli import output, results
from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import model_folder
from updraft_inference.engine import DraftCheckpoint
from updraft_inference.torch_engine.worker import on_passing_thread

_LINE_S = 15.0
_WITH_DRAFT = (figures.HYBRIDS, figures.LOSSLESS)
_IN_ONE_ENGINE = (figures.PEERS, figures.CELLS, figures.HYBRIDS)


class Shown:
    """Progress on stderr: a bar per part on a terminal, otherwise a line every 15 seconds."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", visible=False)
        self._last_s = 0.0

    def begin(self, what: str) -> None:
        self._end()
        self._task = self._progress.add_task(what, total=None, now="")
        if not self._progress.console.is_terminal:
            self._progress.console.print(what)

    def tell(self, now: str, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total, now=now)
        is_due = done == 0 or time.monotonic() - self._last_s > _LINE_S
        if is_due and not self._progress.console.is_terminal:
            self._last_s = time.monotonic()
            self._progress.console.print(f"  {done} of {total}: {now}")

    def _end(self) -> None:
        task = self._progress.tasks[-1]
        self._progress.update(self._task, total=task.total or 1, completed=task.total or 1, now="")


@contextmanager
def shown() -> Iterator[Shown]:
    """Show progress for the length of the block."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[now]}"),
    )
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Shown(progress)


def measure(bench: parts.Bench, chosen: Sequence[Part], show: Shown, *, has_vllm: bool) -> None:
    """Run the chosen parts. Those in this process end before servers start, because they use torch's threads."""
    trained = None
    if any(part in _WITH_DRAFT for part in chosen):
        show.begin("a draft for this bench (5 minutes, once)")
        trained = on_passing_thread(
            lambda: draft.trained(cache_folder(os.environ), bench.model, bench.words, bench.plan.recipe, show.tell)
        )
    if any(part in _IN_ONE_ENGINE for part in chosen):
        asyncio.run(_in_one_engine(bench, chosen, show, trained))
    for part in chosen:
        if part in _IN_ONE_ENGINE:
            continue
        show.begin(part.what)
        if part == figures.GAP:
            asyncio.run(parts.gap(bench))
        elif part == figures.OVERHEAD:
            parts.overhead(bench)
        elif part == figures.LOSSLESS:
            assert trained is not None
            asyncio.run(parts.lossless(bench, trained))
        else:
            asyncio.run(parts.http(bench, has_vllm=has_vllm))


async def _in_one_engine(
    bench: parts.Bench, chosen: Sequence[Part], show: Shown, trained: DraftCheckpoint | None
) -> None:
    async with parts.opened(bench, num_slots=max(*bench.plan.batches, *bench.plan.peer_batches)) as engine:
        for part in chosen:
            if part not in _IN_ONE_ENGINE:
                continue
            show.begin(part.what)
            if part == figures.PEERS:
                await parts.peers(bench, engine)
            elif part == figures.CELLS:
                await parts.cells(bench, engine)
            else:
                assert trained is not None
                await parts.hybrids(bench, engine, trained)


def show_cells(console: Console, measured: figures.Measured, arm: str, title: str) -> None:
    """Ratios of an arm to plain: a row per domain and temperature, a column per batch size."""
    rates = [one for one in measured.rates if one.part == figures.CELLS.name]
    found = figures.ratios(rates, arm, PLAIN)
    batches = sorted({cell.batch for cell in found})
    table = output.table(title, ">temperature", *(f">batch {batch}" for batch in batches))
    for domain, temperature in dict.fromkeys((cell.domain, cell.temperature) for cell in found):
        medians = [figures.spread(found.get(figures.Cell(domain, batch, temperature), [])) for batch in batches]
        table.add_row(domain, f"{temperature:g}", *(f"{one.median:.2f}x" if one else "-" for one in medians))
    if found:
        console.print(table)


def show_lines(console: Console, lines: Sequence[Line]) -> None:
    """The table of bars: each figure with its quartiles and rates."""
    table = output.table("", "~bar", ">measured", "~quartiles (rounds)", ">target", "median of")
    for line in lines:
        bar, spread = line.bar, line.spread
        table.add_row(
            Text(results.MARKS[bar.met], "bold green" if bar.met else "bold red"),
            bar.name,
            results.number(bar.measured, bar.unit),
            f"{results.number(spread.low)} to {results.number(spread.high)} ({spread.count})" if spread else "",
            f"{bar.relation} {results.number(bar.target, bar.unit)}",
            line.note,
        )
    console.print(table)


def main() -> None:
    """Measure, print one table, write bench/results/, and exit 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only see that everything runs; its figures mean nothing")
    parser.add_argument("--with-vllm", action="store_true", help="fail where vLLM is not built; with --quick: use it")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
    arguments = parser.parse_args()
    if arguments.with_vllm and not build.is_built():
        parser.error("vLLM is not built: run `make vllm-build` first")
    has_vllm = build.is_built() and (arguments.with_vllm or not arguments.quick)
    torch.set_num_threads(arguments.threads)
    started, console = datetime.now(UTC), output.console()
    chosen = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    model = model_folder(cache_folder(os.environ))
    plan = QUICK if arguments.quick else FULL
    if figures.HTTP in chosen and not has_vllm:
        console.print(
            "Not compared with vLLM: " + ("--quick leaves it out." if build.is_built() else "run `make vllm-build`.")
        )
    measured = figures.Measured()
    try:
        with shown() as show:
            bench = parts.Bench(
                model=model,
                words=Words.open(model),
                plan=plan,
                threads=arguments.threads,
                tell=show.tell,
                measured=measured,
            )
            measure(bench, chosen, show, has_vllm=has_vllm)
    except KeyboardInterrupt:
        console.print("Stopped: what follows was measured until then.")
    finally:  # also where a part failed: half an hour of the others is not lost
        result = _result(started, measured, figures.lines(measured, chosen, plan.peer_cells, has_vllm=has_vllm))
        console.print(results.write(result, Path("bench/results")))
    if arguments.quick:
        console.print("These figures mean nothing: --quick only sees that everything runs.")
        return
    sys.exit(results.missed(result.bars))


def _result(started: datetime, measured: figures.Measured, lines: Sequence[Line]) -> results.Result:
    """Print the tables, and return the content of the result file."""
    console = output.console()
    show_cells(console, measured, NGRAM, "adaptive n-gram, of plain")
    show_cells(console, measured, OWN_TEXT, "the same, in each request's own text alone")
    show_lines(console, lines)
    arguments = f" ARGS='{' '.join(sys.argv[1:])}'" if sys.argv[1:] else ""
    return results.Result(
        name="serving",
        command=f"make bench-serving{arguments}",
        started=started,
        commit=results.commit(),
        seed=SEED,
        machine=results.machine(),
        bars=tuple(line.bar for line in lines),
        samples=measured.rows(),
    )
