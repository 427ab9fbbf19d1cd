"""The cost of a fleet for one registry. See README.md in this folder."""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from bench import harness
from bench.fleet.run import FleetRun, run
from bench.fleet.usage import allow_files
from bench.harness import Line, Measurements
from rich.table import Table

from updraft_chassis.errors import Exhausted
from updraft_cli import output, results

SEED = 13
PODS = (10, 100, 1000)
BAR_PODS = 1000
PROJECTED_PODS = 10_000
MOST_FOR_TLS = 1.1
"""With TLS over without."""

DELTAS = 3
STEADY_S = 60.0
SHORT_STEADY_S = 20.0
"""For fleets smaller than that of the bars, which only show the cost of a pod."""

MB = 1e6

Figure = Callable[[FleetRun], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table. A linear figure is projected from the smallest and the largest fleet."""

    name: str
    unit: str
    figure: Figure
    is_linear: bool = True

    def projected(self, fleets: Sequence[FleetRun]) -> float | None:
        """The figure for `PROJECTED_PODS`; None if it is not linear or there is only one fleet."""
        small, large = fleets[0], fleets[-1]
        if not self.is_linear or small is large:
            return None
        slope = (self.figure(large) - self.figure(small)) / (large.pods - small.pods)
        return self.figure(large) + slope * (PROJECTED_PODS - large.pods)


def median_s(fleet: FleetRun) -> float:
    return statistics.median(rollout.usage.seconds for rollout in fleet.deltas)


def slowest_s(fleet: FleetRun) -> float:
    return max(rollout.usage.seconds for rollout in fleet.deltas)


def rollout_cpu_s(fleet: FleetRun) -> float:
    return statistics.median(rollout.usage.registry_cpu_s for rollout in fleet.deltas)


def share_percent(fleet: FleetRun) -> float:
    """Bytes sent of new versions, against whole weights for every pod."""
    whole = sum(rollout.weights_bytes for rollout in fleet.deltas) * fleet.pods
    return 100 * sum(rollout.received_bytes for rollout in fleet.deltas) / whole


def peak_bytes(fleet: FleetRun) -> int:
    """Peak memory over all rollouts, including the first."""
    return max(rollout.usage.peak_bytes for rollout in (fleet.whole, *fleet.deltas))


ROWS = (
    Row(name="all connected", unit="s", figure=lambda fleet: fleet.connecting.seconds),
    Row(name="first version, sent whole: all serve it", unit="s", figure=lambda fleet: fleet.whole.usage.seconds),
    Row(name=f"new version: all serve it, median of {DELTAS}", unit="s", figure=median_s),
    Row(name="  slowest", unit="s", figure=slowest_s),
    Row(name="  sent", unit="MB", figure=lambda fleet: fleet.deltas[-1].received_bytes / MB),
    Row(name="  against whole weights for all", unit="%", figure=share_percent, is_linear=False),
    Row(name="  pods that received a delta", unit="", figure=lambda fleet: fleet.deltas[-1].deltas),
    Row(name="  registry's CPU time", unit="s", figure=rollout_cpu_s),
    Row(name="registry's memory, peak in rollouts", unit="MB", figure=lambda fleet: peak_bytes(fleet) / MB),
    Row(name="  steady", unit="MB", figure=lambda fleet: fleet.steady.peak_bytes / MB),
    Row(name="registry's CPU time, steady", unit="%", figure=lambda fleet: fleet.steady.cpu_percent),
    Row(name="  reports", unit="/s", figure=lambda fleet: fleet.reports_per_s),
    Row(
        name="killed and restarted: all connected again",
        unit="s",
        figure=lambda fleet: fleet.restart.back_s,
        is_linear=False,
    ),
    Row(name="  registry's CPU time", unit="s", figure=lambda fleet: fleet.restart.usage.registry_cpu_s),
)


def bars(fleet: FleetRun | None) -> tuple[results.Bar, ...]:
    """The bars of a fleet of 1,000 pods; nothing is measured without one."""
    figures = None
    if fleet is not None:
        figures = (slowest_s(fleet), fleet.steady.peak_bytes / MB, fleet.steady.cpu_percent, fleet.restart.moved)
    slowest, steady_mb, steady_percent, moved = figures or (None,) * 4
    return (
        results.at_most(f"publish until all {BAR_PODS:,} pods have reported it, slowest of {DELTAS}", slowest, 30, "s"),
        results.at_most("registry's memory, steady", steady_mb, 300, "MB"),
        results.at_most("registry's CPU time, steady", steady_percent, 25, "%"),
        results.at_most("pods that changed their version because the registry was killed", moved, 0),
    )


def tls_bars(plain: FleetRun, encrypted: FleetRun) -> Iterator[results.Bar]:
    """The figures of the bars with TLS, over those without."""
    figures: dict[str, Figure] = {
        "publish until all pods have reported it, median": median_s,
        "registry's CPU time for it": rollout_cpu_s,
        "registry's CPU time, steady": lambda fleet: fleet.steady.cpu_percent,
        "registry's memory, steady": lambda fleet: fleet.steady.peak_bytes,
    }
    for name, figure in figures.items():
        ratio = figure(encrypted) / figure(plain)
        yield results.at_most(f"{plain.pods:,} pods with TLS over without: {name}", ratio, MOST_FOR_TLS)


def fleets_table(fleets: Sequence[FleetRun]) -> Table:
    """A column per fleet, and one for the projection."""
    names = (f">{fleet.pods:,}{', TLS' if fleet.has_tls else ''}" for fleet in fleets)
    table = output.table("pods", *names, f">{PROJECTED_PODS:,}, projected")
    plain = [fleet for fleet in fleets if not fleet.has_tls]
    for row in ROWS:
        figures = [*(row.figure(fleet) for fleet in fleets), row.projected(plain)]
        table.add_row(row.name, *(results.number(figure, row.unit) for figure in figures))
    return table


def measure(arguments: argparse.Namespace) -> Measurements:
    arms = [(size, False) for size in arguments.pods] + ([(arguments.pods[-1], True)] if arguments.tls else [])
    fleets = []
    try:
        allow_files(max(arguments.pods))
        with asyncio.Runner() as runner:  # one loop: gRPC goes on calling the loop of the first channel
            for size, has_tls in arms:
                steady_s = SHORT_STEADY_S if size < BAR_PODS or arguments.tls else STEADY_S
                fleet = run(size, seed=SEED, num_deltas=DELTAS, steady_s=steady_s, has_tls=has_tls)
                fleets.append(runner.run(fleet))
    except Exhausted as error:
        sys.exit(f"fleet: {error}")
    of_bars = bars(next((fleet for fleet in fleets if fleet.pods == BAR_PODS), None))
    compared = tls_bars(fleets[-2], fleets[-1]) if arguments.tls else ()
    return Measurements(
        seed=SEED,
        lines=[Line(bar) for bar in (*of_bars, *compared)],
        samples=[asdict(fleet) for fleet in fleets],
        figures=[fleets_table(fleets)],
    )


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted(int(size) for size in text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tls", action="store_true", help="measure the largest fleet with TLS too")
    parser.add_argument("--pods", type=_sizes, default=PODS, help="sizes of the fleets (default 10,100,1000)")
    harness.run("fleet", parser, measure)


if __name__ == "__main__":
    main()
