"""Does an operator end where it should when everything around it misbehaves? See README.md beside this file."""

import argparse
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from tests.cluster import crds
from tests.cluster.control_plane import control_plane
from tests.cluster.operator.fault_storm import CONVERGED_S, SUBJECTS, Seen, storm
from tests.support.redis_server import RedisServer

from updraft_cli import results

SEED = 7


def bars(seen: Seen) -> tuple[results.Bar, ...]:
    """What has to hold."""
    return (
        results.at_most("differences at the end", len(seen.different), 0),
        results.at_most("time to the same objects", seen.converged_s, CONVERGED_S, "s"),
        results.at_most("operators that ended by themselves", len(seen.ended), 0),
        results.at_most("requests that its rights forbid", len(seen.denied), 0),
        results.at_most("writes once all is well", len(seen.writes), 0),
    )


def main() -> None:
    """Run the storm, show what was seen, write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="updraft-faults-") as name, control_plane() as cluster:
        with cluster.api() as api:
            crds.install(api)
        folder = Path(name)
        with RedisServer(folder) as redis:
            seen = storm(cluster, folder, redis.url, seconds=60.0 * arguments.minutes, seed=arguments.seed)
    console = Console()
    console.print(
        f"{_listed(seen.changes)} on {len(SUBJECTS)} resources; {seen.kills} kills; "
        f"faults: {_listed(seen.faults)}; {seen.num_compared} objects were compared"
    )
    for problem in (*seen.different, *seen.ended, *seen.denied, *seen.writes):
        console.print(problem, style="red", markup=False)
    results.show_bars(console, bars(seen))
    result = results.Result(
        name="faults",
        command=f"make bench-faults ARGS='--minutes {arguments.minutes:g} --seed {arguments.seed}'",
        started=started,
        commit=results.commit(),
        seed=arguments.seed,
        machine=results.machine(),
        bars=bars(seen),
        samples=[asdict(seen) | {"changes": dict(seen.changes), "faults": dict(seen.faults)}],
    )
    console.print(f"written to {results.write(result, Path('bench/results'))}")
    sys.exit(results.missed(result.bars))


def _listed(counted: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counted.items()))


if __name__ == "__main__":
    main()
