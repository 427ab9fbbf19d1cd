"""The cost of the console with a large fleet. See README.md in this folder."""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from bench import harness
from bench.console import command
from bench.console.command import CommandCost
from bench.console.served import MARK
from bench.harness import Line, Measurements
from rich.table import Table
from tests.browser.browser import FIRST_LOAD_BYTES, Browser, running
from tests.support.wait import LONG_S

from updraft_cli import output, results

PODS, VERSIONS = 1000, 200
PAGES = ("", "rollout", "versions", "learning", "fleet", "traffic", "history")
"""Below /s/NAME; empty: the overview."""

_LOADED_MS = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
_WATCH = """
window.delays = []; window.events = 0;
document.body.addEventListener('sse:series', () => window.events++);
let last = '';
const read = () => {
  const found = /MARK([0-9]+[.][0-9]+)/.exec(document.getElementById('main').textContent);
  if (found && found[1] !== last) { if (last) window.delays.push(Date.now() / 1000 - Number(found[1])); last = found[1]; }
};
new MutationObserver(read).observe(document.getElementById('main'), {subtree: true, childList: true, characterData: true});
read();
""".replace("MARK", MARK.capitalize())


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCost:
    page: str
    first_ms: float
    """From the click until the page and all it needs are there; nothing cached. The median of the rounds."""
    num_bytes: int
    """The page and all it needs, as they came over the wire, nothing cached."""
    script_ms: float
    """Time of scripts for one update."""
    task_ms: float
    """All that the browser's main thread does for one update: scripts, style, layout, painting."""
    delays_s: tuple[float, ...]
    """From a change to its text on the page; empty where the page does not show it."""


def measure(arguments: argparse.Namespace) -> Measurements:
    with served(arguments.pods, arguments.versions) as (process, address), tempfile.TemporaryDirectory() as profile:
        with running(Path(profile)) as browser:
            browser.show()
            browser.open(address)
            name = str(browser.run("return document.querySelector('nav.pages a[href^=\"/s/\"]').pathname")).split("/")[
                2
            ]
            costs = [page_cost(browser, address, name, page, arguments) for page in PAGES]
        memory_mb = process.memory_info().rss / 1e6
    with tempfile.TemporaryDirectory(prefix="updraft-") as folder:
        of_command = command.measure(Path(folder), arguments.pods, arguments.versions)
    return Measurements(
        seed=0,
        lines=bars(costs, of_command),
        samples=[*map(asdict, costs), asdict(of_command), {"served_memory_mb": memory_mb}],
        figures=(table(costs),),
    )


@contextmanager
def served(pods: int, versions: int) -> Iterator[tuple[psutil.Process, str]]:
    """The console as a process of its own, and its address."""
    command = [sys.executable, "-m", "bench.console.served", str(pods), str(versions)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield psutil.Process(process.pid), process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait(LONG_S)


def page_cost(browser: Browser, address: str, name: str, page: str, arguments: argparse.Namespace) -> PageCost:
    place = address.partition("/?")[0] + (f"/s/{name}/{page}" if page else "/")
    first_ms, num_bytes = [], 0
    for _ in range(arguments.rounds):
        browser.forget_files()
        browser.open(place)
        browser.wait_for("performance.getEntriesByType('navigation')[0].loadEventEnd > 0", what="the page")
        first_ms.append(float(browser.run(_LOADED_MS)))
        num_bytes = browser.transferred()
    browser.run(_WATCH)
    browser.wait_for("window.events > 1", what="the first updates")
    before, events = browser.metrics(), int(browser.run("return window.events"))
    browser.wait_for(
        f"window.events >= {events + arguments.updates}", what="updates", timeout_s=LONG_S + 3 * arguments.updates
    )
    after, num = browser.metrics(), int(browser.run("return window.events")) - events
    return PageCost(
        page=page or "overview",
        first_ms=statistics.median(first_ms),
        num_bytes=num_bytes,
        script_ms=1000 * (after["ScriptDuration"] - before["ScriptDuration"]) / num,
        task_ms=1000 * (after["TaskDuration"] - before["TaskDuration"]) / num,
        delays_s=tuple(browser.run("return window.delays")),
    )


def bars(costs: list[PageCost], of_command: CommandCost) -> tuple[Line, ...]:
    delays = [delay for cost in costs for delay in cost.delays_s]
    return (
        Line(results.at_most("first page, slowest of all pages", max(cost.first_ms for cost in costs) / 1000, 1, "s")),
        Line(
            results.at_most("from a change to the page that shows it, slowest", max(delays, default=None), 2, "s"),
            harness.spread(delays),
        ),
        Line(
            results.at_most(
                "scripts for one update, page with the most", max(cost.script_ms for cost in costs), 300, "ms"
            )
        ),
        Line(
            results.at_most(
                "first load, largest page", max(cost.num_bytes for cost in costs) / 1000, FIRST_LOAD_BYTES / 1000, "kB"
            )
        ),
        Line(results.at_most("`updraft ui` on a real registry: first page", of_command.first_page_s, 1, "s")),
        Line(results.at_most("`updraft ui` on a real registry: resident memory", of_command.memory_mb, 150, "MB")),
        Line(
            results.at_most(
                "`updraft ui` on a real registry: from the command to the address", of_command.start_s, 5, "s"
            )
        ),
    )


def table(costs: list[PageCost]) -> Table:
    shown = output.table("page", ">first load", ">bytes", ">scripts per update", ">main thread per update")
    for cost in costs:
        shown.add_row(
            cost.page,
            results.number(cost.first_ms, "ms"),
            results.number(cost.num_bytes / 1000, "kB"),
            results.number(cost.script_ms, "ms"),
            results.number(cost.task_ms, "ms"),
        )
    return shown


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=PODS)
    parser.add_argument("--versions", type=int, default=VERSIONS)
    parser.add_argument("--rounds", type=int, default=5, help="first loads of each page")
    parser.add_argument("--updates", type=int, default=20, help="updates of each page that are measured")
    harness.run("console", parser, measure)
