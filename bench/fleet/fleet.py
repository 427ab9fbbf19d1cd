"""How large a fleet can one registry lead? See README.md beside this file."""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.fleet.run import FleetRun, run
from bench.fleet.usage import allow_files
from rich.console import Console

from updraft_chassis.errors import Exhausted
from updraft_cli import output, results

SEED = 13
PODS = (10, 100, 1000)
BAR_PODS = 1000
PROJECTED_PODS = 10_000
DELTAS = 3
STEADY_S = 60.0
SHORT_STEADY_S = 20.0
"""For fleets smaller than the one that the bars are about: they tell what a pod costs."""

MB = 1e6

Figure = Callable[[FleetRun], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A row of the table. What is `linear` in the number of pods is projected from smallest and largest fleet."""

    name: str
    unit: str
    figure: Figure
    is_linear: bool = True

    def projected(self, fleets: Sequence[FleetRun]) -> float | None:
        """For `PROJECTED_PODS`; None where that cannot be told."""
        small, large = fleets[0], fleets[-1]
        if not self.is_linear or small is large:
            return None
        slope = (self.figure(large) - self.figure(small)) / (large.pods - small.pods)
        return self.figure(large) + slope * (PROJECTED_PODS - large.pods)


def median_s(fleet: FleetRun) -> float:
    """How long a new version takes."""
    return statistics.median(rollout.usage.seconds for rollout in fleet.deltas)


def slowest_s(fleet: FleetRun) -> float:
    """How long the slowest of the new versions took."""
    return max(rollout.usage.seconds for rollout in fleet.deltas)


def rollout_cpu_s(fleet: FleetRun) -> float:
    """What a new version takes of a core."""
    return statistics.median(rollout.usage.registry_cpu_s for rollout in fleet.deltas)


def share_percent(fleet: FleetRun) -> float:
    """Bytes sent of new versions, against whole weights for every pod."""
    whole = sum(rollout.weights_bytes for rollout in fleet.deltas) * fleet.pods
    return 100 * sum(rollout.received_bytes for rollout in fleet.deltas) / whole


def peak_bytes(fleet: FleetRun) -> int:
    """Most memory in any rollout, the first one included."""
    return max(rollout.usage.peak_bytes for rollout in (fleet.whole, *fleet.deltas))


LINES = (
    Line(name="all connected", unit="s", figure=lambda fleet: fleet.connecting.seconds),
    Line(name="first version, sent whole: all serve it", unit="s", figure=lambda fleet: fleet.whole.usage.seconds),
    Line(name=f"new version: all serve it, median of {DELTAS}", unit="s", figure=median_s),
    Line(name="  slowest", unit="s", figure=slowest_s),
    Line(name="  sent", unit="MB", figure=lambda fleet: fleet.deltas[-1].received_bytes / MB),
    Line(name="  against whole weights for all", unit="%", figure=share_percent, is_linear=False),
    Line(name="  pods that were sent a delta", unit="", figure=lambda fleet: fleet.deltas[-1].deltas),
    Line(name="  registry's time on a core", unit="s", figure=rollout_cpu_s),
    Line(name="registry's memory, most in rollouts", unit="MB", figure=lambda fleet: peak_bytes(fleet) / MB),
    Line(name="  steady", unit="MB", figure=lambda fleet: fleet.steady.peak_bytes / MB),
    Line(name="registry's time on a core, steady", unit="%", figure=lambda fleet: fleet.steady.cpu_percent),
    Line(name="  reports", unit="/s", figure=lambda fleet: fleet.reports_per_s),
    Line(
        name="killed, and started again: all back", unit="s", figure=lambda fleet: fleet.restart.back_s, is_linear=False
    ),
    Line(name="  registry's time on a core", unit="s", figure=lambda fleet: fleet.restart.usage.registry_cpu_s),
)


def bars(fleet: FleetRun | None) -> tuple[results.Bar, ...]:
    """What has to hold for a fleet of 1,000; nothing is measured without one."""
    figures = None
    if fleet is not None:
        figures = (slowest_s(fleet), fleet.steady.peak_bytes / MB, fleet.steady.cpu_percent, fleet.restart.moved)
    slowest, steady_mb, steady_percent, moved = figures or (None,) * 4
    return (
        results.at_most(f"publish until all {BAR_PODS:,} pods have reported it, slowest of {DELTAS}", slowest, 30, "s"),
        results.at_most("registry's memory, steady", steady_mb, 300, "MB"),
        results.at_most("registry's time on a core, steady", steady_percent, 25, "%"),
        results.at_most("pods that changed their version because the registry was killed", moved, 0),
    )


def show(console: Console, fleets: Sequence[FleetRun]) -> None:
    """Print the curve: a column for each fleet, and one for what follows from it."""
    table = output.table("pods", *(f">{fleet.pods:,}" for fleet in fleets), f">{PROJECTED_PODS:,}, projected")
    for line in LINES:
        figures = [*(line.figure(fleet) for fleet in fleets), line.projected(fleets)]
        table.add_row(line.name, *(results.number(figure, line.unit) for figure in figures))
    console.print(table)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted(int(size) for size in text.split(",")))


def main() -> None:
    """Measure, print one table and the bars, write bench/results/; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=_sizes, default=PODS, help="sizes of the fleets (default 10,100,1000)")
    sizes = parser.parse_args().pods
    started, fleets = datetime.now(UTC), []
    try:
        allow_files(max(sizes))
        for size in sizes:
            steady_s = STEADY_S if size >= BAR_PODS else SHORT_STEADY_S
            fleets.append(asyncio.run(run(size, seed=SEED, num_deltas=DELTAS, steady_s=steady_s)))
    except Exhausted as error:
        sys.exit(f"fleet: {error}")
    result = results.Result(
        name="fleet",
        command="make bench-fleet" + ("" if sizes == PODS else f" ARGS='--pods {','.join(map(str, sizes))}'"),
        started=started,
        commit=results.commit(),
        seed=SEED,
        machine=results.machine(),
        bars=bars(next((fleet for fleet in fleets if fleet.pods == BAR_PODS), None)),
        samples=[asdict(fleet) for fleet in fleets],
    )
    console = output.console()
    show(console, fleets)
    results.show_bars(console, result.bars)
    console.print(results.write(result, Path("bench/results")))
    sys.exit(results.missed(result.bars))


if __name__ == "__main__":
    main()
