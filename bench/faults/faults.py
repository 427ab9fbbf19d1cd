"""Whether the operator converges despite faults of the API server, kills and edits. See README.md in this folder."""

import argparse
import secrets
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import harness
from bench.harness import Line, Measurements
from rich.text import Text
from tests.cluster import crds
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.operator.fault_storm import CONVERGED_S, SUBJECTS, StormOutcome, storm
from tests.cluster.operator.leader_kills import kill_leaders
from tests.cluster.operator.replicas import replicas
from tests.cluster.operator.subject import Subject
from tests.support.redis_server import RedisServer

from updraft_cli import results

SEED = 7
LEASE_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderKills:
    """Two replicas whose leader was killed repeatedly."""

    kills: int
    num_terms: int
    """How often the Lease changed its holder."""
    num_writes: int
    strays: list[str]
    """Writes by a replica that did not hold the Lease; must be empty."""


def lead(cluster: ControlPlane, folder: Path, kills: int) -> LeaderKills:
    """Kill leaders as the test does; TimeoutError if the last change is not applied."""
    with cluster.api() as api:
        home, watched = (f"{prefix}-{secrets.token_hex(3)}" for prefix in ("leaders", "led"))
        for name in (home, watched):
            api.create("/api/v1/namespaces", {"metadata": {"name": name}})
        with replicas(cluster, api, folder, home, [watched], lease_seconds=LEASE_S) as running:
            kill_leaders(running, Subject(api, watched, "led"), kills)
            strays = [
                f"{write.verb} {write.resource} {write.name} {write.user} {write.time}" for write in running.strays()
            ]
            num_writes = len(running.writes())
            return LeaderKills(kills=kills, num_terms=len(running.terms()), num_writes=num_writes, strays=strays)


def bars(outcome: StormOutcome, leader_kills: LeaderKills) -> tuple[results.Bar, ...]:
    """Conditions that must hold."""
    return (
        results.at_most("differences at the end", len(outcome.different), 0),
        results.at_most("time to convergence", outcome.converged_s, CONVERGED_S, "s"),
        results.at_most("operators that exited by themselves", len(outcome.ended), 0),
        results.at_most("requests without permission", len(outcome.denied), 0),
        results.at_most("writes after convergence", len(outcome.writes), 0),
        results.at_most("writes without the Lease", len(leader_kills.strays), 0),
        results.at_least("changes of leader", leader_kills.num_terms - 1, leader_kills.kills // 2),
    )


def measure(arguments: argparse.Namespace) -> Measurements:
    with tempfile.TemporaryDirectory(prefix="updraft-faults-") as name, control_plane() as cluster:
        with cluster.api() as api:
            crds.install(api)
        folder = Path(name)
        with RedisServer(folder) as redis:
            outcome = storm(cluster, folder, redis.url, seconds=60.0 * arguments.minutes, seed=arguments.seed)
        leader_kills = lead(cluster, folder, arguments.leader_kills)
    storm_summary = (
        f"{_listed(outcome.changes)} on {len(SUBJECTS)} resources; {outcome.kills} kills; "
        f"faults: {_listed(outcome.faults)}; {outcome.num_compared} objects compared"
    )
    problems = (*outcome.different, *outcome.ended, *outcome.denied, *outcome.writes, *leader_kills.strays)
    return Measurements(
        seed=arguments.seed,
        lines=[Line(bar) for bar in bars(outcome, leader_kills)],
        samples=[
            asdict(outcome) | {"changes": dict(outcome.changes), "faults": dict(outcome.faults)},
            asdict(leader_kills),
        ],
        figures=[
            storm_summary,
            f"{leader_kills.kills} leaders killed, {leader_kills.num_terms} terms, {leader_kills.num_writes} writes",
            *(Text(problem, "red") for problem in problems),
        ],
    )


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="duration of the faults (default 10)")
    parser.add_argument("--leader-kills", type=int, default=20, help="kills of leaders, after the faults (default 20)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of the actions (default {SEED})")
    harness.run("faults", parser, measure)


if __name__ == "__main__":
    main()
