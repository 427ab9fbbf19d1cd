"""How much acceptance does waiting for evidence cost? `python -m bench.learning.delay`. Simulated; seconds.

Candidates come every 13 requests and get better with what they have seen, as drafts of mathematics did. They are judged by the
gate's own interval, on the newest eight requests and on one of ten, which are held out. Effects of a request on a draft are
normal, and half of them come again with the next candidate.
"""

import argparse
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from bench.learning.learning import SEED

from updraft_cli import output
from updraft_rollouts.evidence import Paired, gain

FIRST, EVERY, WAITING, HELD_OUT_EVERY, MAX_HELD_OUT = 16, 13, 8, 10, 32
TOKENS = 10_000
"""Tokens of a request; many, so that whole steps round nothing."""
SPREAD = 0.07
"""Standard deviation of the logarithm of a request's steps, for one draft: between two it is 10 %, as recorded."""
FLAW = 0.01
"""The same for the acceptance length of a candidate."""
GATES = {"as now": (0.9, 1.0), "80 %": (0.8, 1.0), "80 %, any gain": (0.8, 0.0), "if it looks better": (1e-6, 0.0)}
"""Two-sided confidence, and the least gain in percent."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """Acceptance length after each request, versions, and those that were worse than the one before."""

    lengths: list[float]
    num_versions: int
    num_worse: int


def learned(requests: int) -> float:
    """Acceptance length of a draft that knows so many requests: 1.43 after 8, 1.65 after 56."""
    return 1.19 + 0.0787 * math.log2(requests)


def simulate(number: int, confidence: float, least: float, seed: int) -> Simulated:
    """One stream of `number` requests."""
    rng = np.random.default_rng(seed)
    effects, served, lengths = rng.normal(0, SPREAD, number), np.zeros(number), []
    length, num_versions, num_worse = 0.0, 0, 0
    for n in range(1, number + 1):
        if n >= FIRST and (n - FIRST) % EVERY == 0:
            effects = math.sqrt(0.5) * (effects + rng.normal(0, SPREAD, number))
            candidate = math.log(learned(n - WAITING)) + rng.normal(0, FLAW)
            steps = TOKENS / np.exp(candidate + effects)
            if not num_versions or _passes(steps, served, n, confidence, least):
                num_worse += num_versions > 0 and candidate < length
                num_versions, length, served = num_versions + 1, candidate, steps
        lengths.append(math.exp(length))
    return Simulated(lengths, num_versions, num_worse)


def _passes(
    steps: npt.NDArray[np.float64], served: npt.NDArray[np.float64], n: int, confidence: float, least: float
) -> bool:
    held_out = list(range(HELD_OUT_EVERY - 1, n, HELD_OUT_EVERY))[-MAX_HELD_OUT:]
    newest = [one for one in range(n) if one % HELD_OUT_EVERY != HELD_OUT_EVERY - 1][-WAITING:]
    pairs = [
        Paired(tokens=TOKENS, candidate_steps=round(steps[one]), baseline_steps=round(served[one]))
        for one in held_out + newest
    ]
    return gain(pairs, confidence).low_percent >= least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200, help="simulated streams of each row")
    parser.add_argument("--requests", type=int, nargs="+", default=[100, 400])
    arguments = parser.parse_args()
    for number in arguments.requests:
        rows = output.table("gate", ">mean from the 16th on", ">at the end", ">versions", ">worse versions")
        rows.title = (
            f"acceptance length over {number} requests; a candidate at the end has {learned(number - WAITING):.3f}"
        )
        for name, (confidence, least) in GATES.items():
            runs = [simulate(number, confidence, least, SEED + n) for n in range(arguments.streams)]
            rows.add_row(
                name,
                f"{np.mean([np.mean(run.lengths[FIRST - 1 :]) for run in runs]):.3f}",
                f"{np.mean([run.lengths[-1] for run in runs]):.3f}",
                f"{np.mean([run.num_versions for run in runs]):.1f}",
                f"{np.mean([run.num_worse for run in runs]):.2f}",
            )
        output.console().print(rows)


if __name__ == "__main__":
    main()
