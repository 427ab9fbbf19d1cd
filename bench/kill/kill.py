"""Whether a registry loses anything when it is killed repeatedly. See README.md in this folder."""

import argparse
import asyncio
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench import harness
from bench.harness import Line, Measurements
from rich.text import Text
from tests.support.kill_storm import NUM_PODS, storm

from updraft_cli import results

KILLS = 200
SEED = 7


def measure(arguments: argparse.Namespace) -> Measurements:
    with tempfile.TemporaryDirectory(prefix="updraft-kill-") as folder:
        seen = asyncio.run(storm(Path(folder), kills=arguments.kills, seed=arguments.seed))
    summary = (
        f"{seen.kills} kills under {NUM_PODS} pods, {seen.in_canary} of them during a canary; "
        f"{len(seen.answered)} publications were answered, {sum(seen.phases.values())} versions exist "
        f"({', '.join(f'{count} {phase}' for phase, count in seen.phases.most_common())}); "
        f"{seen.orders} directives reached pods"
    )
    return Measurements(
        seed=arguments.seed,
        lines=(
            Line(results.at_least("kills", seen.kills, arguments.kills)),
            Line(results.at_most("lost versions", len(seen.lost), 0)),
            Line(results.at_most("torn states", len(seen.torn), 0)),
            Line(results.at_most("directives without a decision", len(seen.misled), 0)),
        ),
        samples=[asdict(seen) | {"phases": dict(seen.phases)}],
        figures=[summary, *(Text(problem, "red") for problem in seen.problems)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=KILLS, help=f"kills of the registry (default {KILLS})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of the random moments (default {SEED})")
    harness.run("kill", parser, measure)


if __name__ == "__main__":
    main()
