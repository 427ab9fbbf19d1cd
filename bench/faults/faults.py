"""Does an operator end where it should when everything around it misbehaves? See README.md beside this file."""

import argparse
import secrets
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from tests.cluster import crds
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.operator.fault_storm import CONVERGED_S, SUBJECTS, Seen, storm
from tests.cluster.operator.leader_kills import kill_leaders
from tests.cluster.operator.replicas import replicas
from tests.cluster.operator.subject import Subject
from tests.support.redis_server import RedisServer

from updraft_cli import results

SEED = 7
LEASE_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Led:
    """Two replicas, of which the leader was killed again and again."""

    kills: int
    num_terms: int
    """How often the Lease was somebody else's."""
    num_writes: int
    strays: list[str]
    """Writes of one that did not hold the Lease; this must not be."""


def lead(cluster: ControlPlane, folder: Path, kills: int) -> Led:
    """Kill leaders, as the test does; TimeoutError when the last change stays undone."""
    with cluster.api() as api:
        home, watched = (f"{what}-{secrets.token_hex(3)}" for what in ("leaders", "led"))
        for name in (home, watched):
            api.create("/api/v1/namespaces", {"metadata": {"name": name}})
        with replicas(cluster, api, folder, home, [watched], lease_seconds=LEASE_S) as running:
            kill_leaders(running, Subject(api, watched, "led"), kills)
            strays = [f"{each.verb} {each.resource} {each.name} {each.user} {each.time}" for each in running.strays()]
            num_writes = len(running.writes())
            return Led(kills=kills, num_terms=len(running.terms()), num_writes=num_writes, strays=strays)


def bars(seen: Seen, led: Led) -> tuple[results.Bar, ...]:
    """What has to hold."""
    return (
        results.at_most("differences at the end", len(seen.different), 0),
        results.at_most("time to the same objects", seen.converged_s, CONVERGED_S, "s"),
        results.at_most("operators that ended by themselves", len(seen.ended), 0),
        results.at_most("requests that its rights forbid", len(seen.denied), 0),
        results.at_most("writes once all is well", len(seen.writes), 0),
        results.at_most("writes without the Lease", len(led.strays), 0),
        results.at_least("times that another led", led.num_terms - 1, led.kills // 2),
    )


def main() -> None:
    """Run the storm, show what was seen, write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--leader-kills", type=int, default=20, help="of two replicas, after the storm")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="updraft-faults-") as name, control_plane() as cluster:
        with cluster.api() as api:
            crds.install(api)
        folder = Path(name)
        with RedisServer(folder) as redis:
            seen = storm(cluster, folder, redis.url, seconds=60.0 * arguments.minutes, seed=arguments.seed)
        led = lead(cluster, folder, arguments.leader_kills)
    console = Console()
    console.print(
        f"{_listed(seen.changes)} on {len(SUBJECTS)} resources; {seen.kills} kills; "
        f"faults: {_listed(seen.faults)}; {seen.num_compared} objects were compared"
    )
    console.print(f"{led.kills} leaders were killed, {led.num_terms} led, {led.num_writes} writes")
    for problem in (*seen.different, *seen.ended, *seen.denied, *seen.writes, *led.strays):
        console.print(problem, style="red", markup=False)
    results.show_bars(console, bars(seen, led))
    result = results.Result(
        name="faults",
        command=(
            f"make bench-faults ARGS='--minutes {arguments.minutes:g} --leader-kills {arguments.leader_kills}"
            f" --seed {arguments.seed}'"
        ),
        started=started,
        commit=results.commit(),
        seed=arguments.seed,
        machine=results.machine(),
        bars=bars(seen, led),
        samples=[
            asdict(seen) | {"changes": dict(seen.changes), "faults": dict(seen.faults)},
            asdict(led),
        ],
    )
    console.print(f"written to {results.write(result, Path('bench/results'))}")
    sys.exit(results.missed(result.bars))


def _listed(counted: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counted.items()))


if __name__ == "__main__":
    main()
