"""How often does the live gate err, and how long does it take? See README.md beside this file."""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from bench.gate.rollouts import Outcome, roll_out
from bench.gate.traffic import Truth
from rich.console import Console

from updraft_cli import output, results
from updraft_rollouts.policy import RolloutPolicy, RolloutStep
from updraft_rollouts.terms import Comparison

SEED = 11
POLICY = RolloutPolicy()
"""What a registry does unless told otherwise."""
SWITCHBACK = replace(POLICY, analysis=replace(POLICY.analysis, comparison=Comparison.SWITCHBACK))
EFFECTS = (-0.20, -0.10, -0.05, -0.02, 0.0, 0.02, 0.05, 0.10)
FLEETS = {2: 300, 16: 200, 100: 50, 1000: 10}
"""Rollouts of each effect by number of pods: large fleets cost more to simulate and vary less."""
EQUAL_ROLLOUTS = 2000
"""Of the fleet of 16 at equal quality, where the rate of false promotions is the question."""
FLEET = 16
SMALL = replace(POLICY, steps=(RolloutStep(pods_percent=10, hold_seconds=240),))
"""Two pods from the beginning to the end, for as long as both steps of the default policy together."""
HASTY = replace(SMALL, analysis=replace(SMALL.analysis, interval_seconds=10))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Rollouts of one kind."""

    traffic: str
    truth: Truth
    policy: RolloutPolicy = POLICY
    rollouts: int
    is_shifting: bool = False
    """The traffic changes at a random moment of the canary."""

    @property
    def comparison(self) -> str:
        is_small = self.truth.pods <= 2 and self.policy.analysis.comparison is Comparison.AUTO
        return "switchback" if is_small or self.policy is SWITCHBACK else "pods"


def scenarios() -> Iterator[Scenario]:
    """Everything that is simulated, in the order of the table."""
    for pods, rollouts in FLEETS.items():
        for effect in EFFECTS:
            number = EQUAL_ROLLOUTS if (pods, effect) == (FLEET, 0.0) else rollouts
            yield Scenario(traffic="heavy-tailed", truth=Truth(pods=pods, effect=effect), rollouts=number)
    for effect in (-0.10, 0.0, 0.10):
        truth = Truth(pods=FLEET, effect=effect)
        yield Scenario(traffic="shift midway", truth=truth, rollouts=200, is_shifting=True)
    for pods, effect in ((FLEET, 0.0), (2, 0.0)):
        truth = Truth(pods=pods, effect=effect, median_tokens=2048, requests_per_s=0.2)
        yield Scenario(traffic="outputs of minutes", truth=truth, rollouts=200)
    truth = Truth(pods=FLEET, effect=0.05, slowdown=0.2)
    yield Scenario(traffic="slower draft", truth=truth, rollouts=100)
    for policy in (POLICY, SWITCHBACK):
        for effect in (-0.10, 0.0, 0.10):
            truth = Truth(pods=FLEET, effect=effect, pod_sigma=0.05)
            yield Scenario(traffic="sticky, 5 % by pod", truth=truth, policy=policy, rollouts=200)
    equal = Truth(pods=FLEET, effect=0.0)
    yield Scenario(traffic="always 2 pods", truth=equal, policy=SMALL, rollouts=1000)
    yield Scenario(traffic="the same, slices of 10 s", truth=equal, policy=HASTY, rollouts=1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """The outcomes of a scenario."""

    scenario: Scenario
    outcomes: Sequence[Outcome]

    def count(self, end: str) -> int:
        return sum(outcome.end == end for outcome in self.outcomes)

    def percent(self, end: str) -> float:
        return 100 * self.count(end) / len(self.outcomes)

    def interval(self, end: str) -> tuple[float, float]:
        """Wilson's 95 % interval of the share, in percent."""
        n, share, z = len(self.outcomes), self.count(end) / len(self.outcomes), 1.96
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)

    @property
    def verdict_minutes(self) -> list[float]:
        """How long it took where there was a verdict, ascending."""
        return sorted(outcome.minutes for outcome in self.outcomes if outcome.end != "no verdict")

    @property
    def most_pods_touched(self) -> int:
        return max(outcome.pods_touched for outcome in self.outcomes)

    def row(self) -> dict[str, object]:
        """As the result file has it."""
        told = {"traffic": self.scenario.traffic, "comparison": self.scenario.comparison}
        ends = [(outcome.end, round(outcome.minutes, 2), outcome.pods_touched) for outcome in self.outcomes]
        return told | asdict(self.scenario.truth) | {"outcomes": ends}


def simulate(scenario: Scenario, number: int, rollouts: int) -> Tally:
    """Roll out again and again, each time with other traffic."""
    outcomes = []
    for n in range(rollouts):
        truth = scenario.truth
        if scenario.is_shifting:
            truth = replace(truth, shift_s=float(np.random.default_rng((SEED, number, n)).uniform(30.0, 400.0)))
        outcomes.append(roll_out(truth, scenario.policy, (number, n, SEED)))
    return Tally(scenario=scenario, outcomes=outcomes)


def bars(tallies: Sequence[Tally]) -> tuple[results.Bar, ...]:
    """What the gate has to keep in a fleet of 16."""
    by_effect = {
        tally.scenario.truth.effect: tally
        for tally in tallies
        if tally.scenario.traffic == "heavy-tailed" and tally.scenario.truth.pods == FLEET
    }
    equal, worse, better = by_effect[0.0], by_effect[-0.10], by_effect[0.10]
    alpha = 100 * (1 - POLICY.analysis.confidence)
    canary = math.ceil(FLEET * POLICY.steps[0].pods_percent / 100)
    return (
        results.at_least("rollouts at equal quality", len(equal.outcomes), EQUAL_ROLLOUTS),
        results.at_most("falsely promoted at equal quality", equal.percent("promoted"), alpha, "%"),
        results.at_most("the same, upper end of its 95 % interval", equal.interval("promoted")[1], alpha, "%"),
        results.at_least("10 % worse: rolled back", worse.percent("rolled back"), 100, "%"),
        results.at_most("10 % worse: most pods ever touched", worse.most_pods_touched, canary),
        results.at_least("10 % better: promoted", better.percent("promoted"), 95, "%"),
    )


def show(console: Console, tallies: Sequence[Tally]) -> None:
    """Print what came out, one row a scenario."""
    columns = (">promoted", ">rolled back", ">no verdict", ">minutes", ">9 of 10", ">most pods")
    table = output.table("traffic", ">pods", "compared by", ">effect", ">rollouts", *columns)
    for tally in tallies:
        truth, minutes = tally.scenario.truth, tally.verdict_minutes
        table.add_row(
            tally.scenario.traffic,
            str(truth.pods),
            tally.scenario.comparison,
            f"{100 * truth.effect:+.0f} %",
            str(len(tally.outcomes)),
            *(_share(tally, end) for end in ("promoted", "rolled back")),
            f"{tally.percent('no verdict'):.0f} %",
            f"{statistics.median(minutes):.1f}" if minutes else "-",
            f"{minutes[math.ceil(0.9 * len(minutes)) - 1]:.1f}" if minutes else "-",
            str(tally.most_pods_touched),
        )
    console.print(table)


def _share(tally: Tally, end: str) -> str:
    low, high = tally.interval(end)
    return f"{tally.percent(end):.1f} % ({low:.1f}-{high:.1f})"


def main() -> None:
    """Simulate, print one table, write bench/results/; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the rollouts: a look, not a measurement")
    is_quick = parser.parse_args().quick
    started = datetime.now(UTC)
    tallies = [
        simulate(s, number, max(5, s.rollouts // 20) if is_quick else s.rollouts)
        for number, s in enumerate(scenarios())
    ]
    result = results.Result(
        name="gate",
        command="make bench-gate" + (" ARGS=--quick" if is_quick else ""),
        started=started,
        commit=results.commit(),
        seed=SEED,
        machine=results.machine(),
        bars=bars(tallies),
        samples=[tally.row() for tally in tallies],
    )
    console = Console()
    show(console, tallies)
    results.show_bars(console, result.bars)
    console.print(results.write(result, Path("bench/results")))
    sys.exit(results.missed(result.bars))


if __name__ == "__main__":
    main()
