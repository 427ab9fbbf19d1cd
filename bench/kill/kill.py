"""Does a registry lose anything when it is killed again and again? See README.md beside this file."""

import argparse
import asyncio
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from tests.support.kill_storm import NUM_PODS, Seen, storm

from updraft_cli import results

SEED = 7


def bars(seen: Seen, kills: int) -> tuple[results.Bar, ...]:
    """What has to hold."""
    return (
        results.at_least("kills", seen.kills, kills),
        results.at_most("lost versions", len(seen.lost), 0),
        results.at_most("torn states", len(seen.torn), 0),
        results.at_most("orders that nobody gave", len(seen.misled), 0),
    )


def main() -> None:
    """Run the storm, show what was seen, write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="updraft-kill-") as folder:
        seen = asyncio.run(storm(Path(folder), kills=arguments.kills, seed=arguments.seed))
    console = Console()
    console.print(
        f"{seen.kills} kills under {NUM_PODS} pods: {seen.in_canary} in the middle of a canary; "
        f"{len(seen.answered)} publications were answered, {sum(seen.phases.values())} versions are there "
        f"({', '.join(f'{count} {phase}' for phase, count in seen.phases.most_common())}); "
        f"{seen.orders} orders reached pods"
    )
    for problem in seen.problems:
        console.print(problem, style="red")
    results.show_bars(console, bars(seen, arguments.kills))
    result = results.Result(
        name="kill",
        command=f"make bench-kill ARGS='--kills {arguments.kills} --seed {arguments.seed}'",
        started=started,
        commit=results.commit(),
        seed=arguments.seed,
        machine=results.machine(),
        bars=bars(seen, arguments.kills),
        samples=[asdict(seen) | {"phases": dict(seen.phases)}],
    )
    console.print(f"written to {results.write(result, Path('bench/results'))}")
    sys.exit(results.missed(result.bars))


if __name__ == "__main__":
    main()
