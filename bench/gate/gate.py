"""The errors and the duration of the live gate. See README.md in this folder."""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from bench import harness
from bench.gate.rollouts import Outcome, roll_out
from bench.gate.traffic import Truth
from bench.harness import Line, Measurements
from rich.table import Table

from updraft_cli import output, results
from updraft_rollouts.policy import RolloutPolicy, RolloutStep
from updraft_rollouts.terms import Comparison

SEED = 11
POLICY = RolloutPolicy()
"""The default of a registry."""
SWITCHBACK = replace(POLICY, analysis=replace(POLICY.analysis, comparison=Comparison.SWITCHBACK))
EFFECTS = (-0.20, -0.10, -0.05, -0.02, 0.0, 0.02, 0.05, 0.10)
FLEETS = {2: 300, 16: 200, 100: 50, 1000: 10}
"""Rollouts per effect by number of pods. Large fleets cost more to simulate and vary less."""
EQUAL_ROLLOUTS = 2000
"""For the fleet of 16 at equal quality, which measures the rate of false promotions."""
FLEET = 16
FIVE, ONE_WORSE = "5 domains", "5 domains, one -10 %"
SMALL = replace(POLICY, steps=(RolloutStep(pods_percent=10, hold_seconds=240),))
"""Two pods all the time, for as long as both steps of the default policy together."""
SHORT_SLICES = replace(SMALL, analysis=replace(SMALL.analysis, interval_seconds=10))


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
    """All scenarios, in the order of the table."""
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
    yield Scenario(traffic="the same, slices of 10 s", truth=equal, policy=SHORT_SLICES, rollouts=1000)
    for effect in (-0.10, 0.0, 0.10):
        truth = Truth(pods=2, effect=effect, share_alone=1 / 8)
        yield Scenario(traffic="one of 8 steps", truth=truth, rollouts=300)
    yield from domain_scenarios()


def domain_scenarios() -> Iterator[Scenario]:
    """Traffic of named domains, in which the candidate is equally good, or worse in one of them."""
    for pods, rollouts in ((FLEET, 200), (2, 300)):
        truth = Truth(pods=pods, effect=0.10, domains=5, effect_in_one=-0.10)
        yield Scenario(traffic=ONE_WORSE, truth=truth, rollouts=rollouts)
        for effect in (0.0, 0.05):
            truth = Truth(pods=pods, effect=effect, domains=5, effect_in_one=effect)
            yield Scenario(traffic=FIVE, truth=truth, rollouts=rollouts)
    for effect in (0.0, 0.05):
        truth = Truth(pods=FLEET, effect=effect, domains=16, effect_in_one=effect)
        yield Scenario(traffic="16 domains", truth=truth, rollouts=200)


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
        """Durations of the rollouts with a verdict, ascending."""
        return sorted(outcome.minutes for outcome in self.outcomes if outcome.end != "no verdict")

    @property
    def most_pods_touched(self) -> int:
        return max(outcome.pods_touched for outcome in self.outcomes)

    def row(self) -> dict[str, object]:
        """For the result file."""
        names = {"traffic": self.scenario.traffic, "comparison": self.scenario.comparison}
        ends = [(outcome.end, round(outcome.minutes, 2), outcome.pods_touched) for outcome in self.outcomes]
        return names | asdict(self.scenario.truth) | {"outcomes": ends}


def simulate(scenario: Scenario, number: int, rollouts: int) -> Tally:
    """Roll out many times, each with other traffic."""
    outcomes = []
    for n in range(rollouts):
        truth = scenario.truth
        if scenario.is_shifting:
            truth = replace(truth, shift_s=float(np.random.default_rng((SEED, number, n)).uniform(30.0, 400.0)))
        outcomes.append(roll_out(truth, scenario.policy, (number, n, SEED)))
    return Tally(scenario=scenario, outcomes=outcomes)


def bars(tallies: Sequence[Tally]) -> tuple[results.Bar, ...]:
    """The bars of the gate in a fleet of 16."""
    by_effect = {tally.scenario.truth.effect: tally for tally in _in_fleet(tallies, "heavy-tailed")}
    equal, worse, better = by_effect[0.0], by_effect[-0.10], by_effect[0.10]
    in_domains = {tally.scenario.truth.effect: tally for tally in _in_fleet(tallies, FIVE)}
    (one_worse,) = _in_fleet(tallies, ONE_WORSE)
    alpha = 100 * (1 - POLICY.analysis.confidence)
    canary = math.ceil(FLEET * POLICY.steps[0].pods_percent / 100)
    return (
        results.at_least("rollouts at equal quality", len(equal.outcomes), EQUAL_ROLLOUTS),
        results.at_most("falsely promoted at equal quality", equal.percent("promoted"), alpha, "%"),
        results.at_most("the same, upper end of its 95 % interval", equal.interval("promoted")[1], alpha, "%"),
        results.at_least("10 % worse: rolled back", worse.percent("rolled back"), 100, "%"),
        results.at_most("10 % worse: most pods ever touched", worse.most_pods_touched, canary),
        results.at_least("10 % better: promoted", better.percent("promoted"), 95, "%"),
        results.at_most("10 % worse in one of five domains: promoted", one_worse.percent("promoted"), alpha, "%"),
        results.at_least("the same: rolled back before the deadline", one_worse.percent("rolled back"), 80, "%"),
        results.at_most("equal in five domains: rolled back", in_domains[0.0].percent("rolled back"), alpha, "%"),
        results.at_least("5 % better in five domains: promoted", in_domains[0.05].percent("promoted"), 95, "%"),
    )


def _in_fleet(tallies: Sequence[Tally], traffic: str) -> list[Tally]:
    return [one for one in tallies if one.scenario.traffic == traffic and one.scenario.truth.pods == FLEET]


def scenarios_table(tallies: Sequence[Tally]) -> Table:
    """One row per scenario."""
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
    return table


def _share(tally: Tally, end: str) -> str:
    low, high = tally.interval(end)
    return f"{tally.percent(end):.1f} % ({low:.1f}-{high:.1f})"


def measure(arguments: argparse.Namespace) -> Measurements:
    tallies = [
        simulate(one, number, max(5, one.rollouts // 20) if arguments.quick else one.rollouts)
        for number, one in enumerate(scenarios())
    ]
    return Measurements(
        seed=SEED,
        lines=[Line(bar) for bar in bars(tallies)],
        samples=[tally.row() for tally in tallies],
        figures=[scenarios_table(tallies)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="run a twentieth of the rollouts; the figures mean little")
    harness.run("gate", parser, measure)


if __name__ == "__main__":
    main()
