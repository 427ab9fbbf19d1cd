"""The speed of the built-in engine against its peers and against itself. See README.md in this folder."""

import argparse
import asyncio
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from bench import harness
from bench.harness import spread
from bench.serving import draft, figures, parts
from bench.serving.figures import NGRAM, OWN_TEXT, PARTS, PLAIN, Part
from bench.serving.plan import FULL, QUICK, SEED, Plan, Recipe
from bench.serving.workloads import Words
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tests.vllm import build

from updraft_chassis.errors import InvalidInput
from updraft_cli import output, results
from updraft_cli.local.folders import cache_folder
from updraft_inference.engine import DraftCheckpoint
from updraft_inference.torch_engine.worker import on_passing_thread

_LINE_S = 15.0
_IN_ONE_ENGINE = {figures.PEERS: parts.peers, figures.CELLS: parts.cells, figures.AUTOS: parts.auto}
_ALONE = {
    figures.GAP: parts.gap,
    figures.OVERHEAD: parts.overhead,
    figures.LOSSLESS: parts.lossless,
    figures.HTTP: parts.http,
}


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


def measure(bench: parts.Bench, chosen: Sequence[Part], show: Shown) -> None:
    """Run the chosen parts. Those in this process end before servers start, because they use torch's threads."""
    recipes = {figures.AUTOS: bench.plan.narrow, figures.LOSSLESS: bench.plan.recipe}
    drafts = {recipe: _draft(bench, recipe, show) for part, recipe in recipes.items() if part in chosen}
    bench = replace(bench, drafts=drafts)
    if any(part in _IN_ONE_ENGINE for part in chosen):
        asyncio.run(_in_one_engine(bench, chosen, show))
    for part in chosen:
        if part in _ALONE:
            show.begin(part.what)
            asyncio.run(_ALONE[part](bench))


def _draft(bench: parts.Bench, recipe: Recipe, show: Shown) -> DraftCheckpoint:
    show.begin(f"a draft of {', '.join(recipe.domains)} (5 minutes, once)")
    cache = cache_folder(os.environ)
    return on_passing_thread(lambda: draft.trained(cache, bench.model, bench.words, recipe, bench.tell))


async def _in_one_engine(bench: parts.Bench, chosen: Sequence[Part], show: Shown) -> None:
    async with parts.opened(bench, num_slots=max(*bench.plan.batches, *bench.plan.peer_batches)) as engine:
        for part in chosen:
            if part in _IN_ONE_ENGINE:
                show.begin(part.what)
                await _IN_ONE_ENGINE[part](bench, engine)


def cells_table(measured: figures.Measured, arm: str, title: str) -> Table:
    """Ratios of an arm to plain: a row per domain and temperature, a column per batch size."""
    rates = [one for one in measured.rates if one.part == figures.CELLS.name]
    ratios = figures.ratios(rates, arm, PLAIN)
    batches = sorted({cell.batch for cell in ratios})
    table = output.table(title, ">temperature", *(f">batch {batch}" for batch in batches))
    for domain, temperature in dict.fromkeys((cell.domain, cell.temperature) for cell in ratios):
        medians = [spread(ratios.get(figures.Cell(domain, batch, temperature), [])) for batch in batches]
        table.add_row(domain, f"{temperature:g}", *(f"{one.median:.2f}x" if one else "-" for one in medians))
    return table


def main() -> None:
    """Measure all parts. Unlike other benchmarks, an interrupted run reports what it has measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="only check that everything runs; its figures mean nothing"
    )
    parser.add_argument("--with-vllm", action="store_true", help="fail if vLLM is not built; with --quick: use it")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="run only these parts")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine (default 2)")
    parser.add_argument("--minutes", type=float, default=12, help="minutes of the rounds of `auto` (default 12)")
    parser.add_argument("--trainer", action="store_true", help="`auto` with a trainer beside, as `updraft up` runs it")
    parser.add_argument(
        "--add-to", type=Path, metavar="FILE", help="a result file of this commit, whose rounds of `auto` count as well"
    )
    arguments = parser.parse_args()
    if arguments.with_vllm and not build.is_built():
        parser.error("vLLM is not built: run `make vllm-build` first")
    has_vllm = build.is_built() and (arguments.with_vllm or not arguments.quick)
    torch.set_num_threads(arguments.threads)
    started, console = datetime.now(UTC), output.console()
    chosen = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    model, plan, measured = harness.model(), QUICK if arguments.quick else FULL, figures.Measured()
    if arguments.add_to:
        try:
            measured = earlier(arguments.add_to, commit=results.commit(), has_trainer=arguments.trainer)
        except InvalidInput as error:
            parser.error(str(error))
    if figures.HTTP in chosen and not has_vllm:
        console.print(
            "Not compared with vLLM: " + ("--quick leaves it out." if build.is_built() else "run `make vllm-build`.")
        )
    try:
        with shown() as show:
            bench = parts.Bench(
                model=model,
                words=Words.open(model),
                plan=plan,
                threads=arguments.threads,
                tell=show.tell,
                measured=measured,
                has_vllm=has_vllm,
                auto_s=math.inf if arguments.quick else 60 * arguments.minutes,
                has_trainer=arguments.trainer,
            )
            measure(bench, chosen, show)
    except KeyboardInterrupt:
        console.print("Stopped. These are the measurements until then:")
    finally:  # also if a part failed, because half an hour of the others is not lost
        missed = harness.report("serving", started, measurements(measured, chosen, plan, has_vllm=has_vllm))
    if arguments.quick:
        console.print("These figures mean nothing: --quick only checks that everything runs.")
        return
    sys.exit(missed)


def earlier(path: Path, *, commit: str, has_trainer: bool) -> figures.Measured:
    """The samples of `auto` of an earlier run. InvalidInput if they are not of the same code and load."""
    try:
        result = results.Result.model_validate_json(path.read_bytes())
        measured = figures.of_auto(result.samples)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{path} is no result file of make bench-serving: {error}") from error
    if not commit or commit.endswith("+") or result.commit != commit:
        raise InvalidInput(f"{path} measured commit {result.commit or 'unknown'}, and this is {commit or 'unknown'}")
    if bool(measured.learnt) is not has_trainer:
        raise InvalidInput(f"{path} measured {'with' if measured.learnt else 'without'} --trainer: do the same")
    return measured


def measurements(
    measured: figures.Measured, chosen: Sequence[Part], plan: Plan, *, has_vllm: bool
) -> harness.Measurements:
    tables = (
        cells_table(measured, NGRAM, "adaptive n-gram, of plain"),
        cells_table(measured, OWN_TEXT, "the same, in each request's own text alone"),
    )
    return harness.Measurements(
        seed=SEED,
        lines=figures.lines(measured, chosen, plan.peer_cells, has_vllm=has_vllm),
        samples=measured.rows(),
        figures=[table for table in tables if table.row_count],
    )
