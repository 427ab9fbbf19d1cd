"""How much acceptance does waiting for evidence cost? `python -m bench.learning.delay`. Simulated; minutes of one core.

Drafts get better with what they have seen, as drafts of mathematics did. The draft in training is judged when the trainer's
schedule says so: every 20 optimizer steps, which are 13 requests, and at each fit, when all traffic or a kind of it has 16
requests, and each time that these double. A fit also judges a draft in closed form, which is as good on average. The trainer's
own gate decides, by the newest eight requests and by one of ten, which are held out.

Effects of a request on a draft are normal. Half of their variance, and of a draft's own flaw, is gone after 20 steps of
training; a draft in closed form has its own. Kinds come by chance, equally often, and drafts learn them alike.

Left out: time (estimates that come early, and fits, during which no step is taken), a restart from the serving draft, the best
draft that a kind had, and that a closed form is worse than the draft in training after a shift or many steps.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from bench import harness
from bench.learning.arms import OURS
from bench.learning.learning import SEED
from bench.learning.replay import EVALUATION_SAMPLES, FIRST_SAMPLES
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from updraft_cli import output
from updraft_rollouts.evidence import Paired
from updraft_trainer.data.selection import NUM_RECENT, TrafficMix
from updraft_trainer.publishing.decision import NO_DRAFT, decide
from updraft_trainer.publishing.estimate import GainEstimate, is_better, looks_better
from updraft_trainer.publishing.schedule import (
    Progress,
    TrainingSchedule,
    is_estimate_due,
    is_fit_due,
    num_newest_judges,
)

NUM_JUDGES = OURS.thresholds.min_samples
TOKENS = 10_000
"""Tokens of a request; many, so that whole steps round nothing."""
SPREAD = 0.07
"""Standard deviation of the logarithm of a request's steps, for one draft: between two it is 10 %, as recorded."""
FLAW = 0.01
"""The same for the acceptance length of a candidate in a kind."""

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Gate:
    """Two-sided confidence, the least gain in percent, and how many candidates a fit has after the first version: the draft in
    closed form, and the draft in training."""

    name: str
    confidence: float = OURS.thresholds.confidence
    least: float = OURS.thresholds.min_gain_percent
    at_fits: int = 2


GATES = (
    Gate("as now: 90 %, 1 %"),
    Gate("at fits only the closed form", at_fits=1),
    Gate("no looks at fits", at_fits=0),
    Gate("80 %, 1 %", confidence=0.8),
    Gate("80 %, any gain", confidence=0.8, least=0.0),
    Gate("whatever looks better", confidence=1e-6, least=0.0),
)


class Due(NamedTuple):
    """After a request: optimizer steps so far, and whether an estimate and a fit are due."""

    steps: int
    is_estimate: bool
    is_fit: bool


def looks(kinds: Sequence[str]) -> Iterator[Due]:
    """After each request of a stream, by the trainer's own schedule."""
    schedule = TrainingSchedule(
        evaluate_steps=OURS.evaluate_steps, evaluate_seconds=math.inf, checkpoint_seconds=math.inf
    )
    sizes, fitted = Counter[str](), Counter[str]()
    last = Progress(step=0, num_held_out=0, at_s=0.0)
    for n, kind in enumerate(kinds, 1):
        sizes[kind] += 1
        steps = int(max(0, n - FIRST_SAMPLES + 1) * OURS.steps_per_request)
        is_estimate = is_estimate_due(replace(last, step=steps), last, schedule)
        if is_estimate:
            last = replace(last, step=last.step + OURS.evaluate_steps)
        is_fit = is_fit_due(sizes, fitted, first=2 * NUM_JUDGES)
        if is_fit:
            fitted = sizes.copy()
        yield Due(steps, is_estimate, is_fit)


@dataclass(frozen=True, slots=True)
class Draft:
    """`flaws` [kinds] and `effects` [requests] change its acceptance lengths from what is learned after `known` requests, as
    logarithms."""

    known: int
    flaws: Numbers
    effects: Numbers

    @property
    def length(self) -> float:
        """Acceptance length for the mix, whose kinds come equally often."""
        return learned(self.known) * math.exp(self.flaws.mean())


@dataclass(frozen=True, slots=True)
class Simulated:
    """Acceptance length after each request, candidates that were judged, versions, and those worse than the one before."""

    lengths: list[float]
    num_judged: int
    num_versions: int
    num_worse: int


def learned(requests: int) -> float:
    """Acceptance length of a draft that knows so many requests: 1.43 after 8, 1.65 after 56."""
    return 1.19 + 0.0787 * math.log2(requests)


class Stream:
    """Simulated requests of `num_kinds` kinds, the drafts that are made of them, and the one that serves."""

    def __init__(self, number: int, num_kinds: int, gate: Gate, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._num_kinds = num_kinds
        self._kinds = self._rng.integers(0, num_kinds, number)
        self._gate = gate
        self._thresholds = replace(OURS.thresholds, confidence=gate.confidence, min_gain_percent=gate.least)
        self._trained = self._new_draft(0)
        self._trained_steps = 0
        self._served: Draft | None = None
        self._num_judged = self._num_versions = self._num_worse = 0

    def run(self) -> Simulated:
        """All requests in order."""
        lengths = []
        for n, due in enumerate(looks([str(kind) for kind in self._kinds]), 1):
            if due.is_estimate:
                self._train(n, due.steps)
                self._publish_first([self._trained], n)
            if due.is_fit:
                self._train(n, due.steps)
                draft = self._new_draft(
                    n - OURS.num_waiting
                )  # also if nothing judges it: all gates see the same drafts
                if self._gate.at_fits or self._served is None:
                    self._fit(draft, n)
            lengths.append(self._served.length if self._served else 1.0)
        return Simulated(lengths, self._num_judged, self._num_versions, self._num_worse)

    def _new_draft(self, known: int) -> Draft:
        rng = self._rng
        return Draft(known, rng.normal(0, FLAW, self._num_kinds), rng.normal(0, SPREAD, len(self._kinds)))

    def _train(self, n: int, steps: int) -> None:
        """Make the draft in training that of now."""
        kept = 0.5 ** ((steps - self._trained_steps) / OURS.evaluate_steps)
        old, new = self._trained, self._new_draft(n - OURS.num_waiting)
        flaws, effects = (
            math.sqrt(kept) * before + math.sqrt(1 - kept) * now
            for before, now in ((old.flaws, new.flaws), (old.effects, new.effects))
        )
        self._trained, self._trained_steps = Draft(new.known, flaws, effects), steps

    def _fit(self, draft: Draft, n: int) -> None:
        """As `loop.Trainer.fit` does with this draft in closed form."""
        old = self._trained
        closed, trained = self._estimate(draft, n), self._estimate(old, n)
        candidates = [draft]
        if is_better(closed, trained):
            self._trained = draft
        elif self._gate.at_fits == 2:
            candidates.insert(1 if looks_better(closed, trained) else 0, old)
        self._publish_first(candidates, n)

    def _publish_first(self, candidates: Sequence[Draft], n: int) -> None:
        """The first one that is good enough."""
        self._num_judged += len(candidates)
        version = NO_DRAFT if self._served is None else self._num_versions
        for draft in candidates:
            estimate = self._estimate(draft, n)
            if decide(estimate, subject="it", baseline_version=version, thresholds=self._thresholds).should_publish:
                self._num_worse += self._served is not None and draft.length < self._served.length
                self._served, self._num_versions = draft, self._num_versions + 1
                return

    def _estimate(self, draft: Draft, n: int) -> GainEstimate:
        """Judged after `n` requests, over what serves."""
        every = OURS.evaluation_every
        held_out = [one for one in range(n) if one % every == every - 1]
        training = [one for one in range(n) if one % every != every - 1]
        newest = training[len(training) - num_newest_judges(len(training), OURS.num_waiting) :]
        judges = [*held_out[-EVALUATION_SAMPLES:], *newest]
        names = {str(one): str(self._kinds[one]) for one in judges}
        recent = Counter(str(kind) for kind in self._kinds[max(0, n - NUM_RECENT) : n])
        mix = TrafficMix(kinds=names, shares={kind: count / recent.total() for kind, count in recent.items()})
        candidate, baseline = self._steps(draft, judges), self._steps(self._served, judges)
        rows = zip(names.values(), mix.weights(list(names)), candidate, baseline, strict=True)
        return GainEstimate(
            trace_ids=tuple(names),
            domains=("",) * len(names),
            pairs=tuple(
                Paired(tokens=TOKENS, candidate_steps=mine, baseline_steps=other, kind=kind, weight=weight)
                for kind, weight, mine, other in rows
            ),
        )

    def _steps(self, draft: Draft | None, requests: Sequence[int]) -> list[int]:
        if draft is None:
            return [TOKENS] * len(requests)
        effects = draft.flaws[self._kinds[list(requests)]] + draft.effects[list(requests)]
        return [round(steps) for steps in (TOKENS / (learned(draft.known) * np.exp(effects))).tolist()]


def table(number: int, num_kinds: int, streams: int, progress: Bar) -> Table:
    """Means over so many streams of `number` requests of `num_kinds` kinds, by gate."""
    first = 2 * NUM_JUDGES
    rows = output.table(
        "gate", f">mean from the {first}th on", ">at the end", ">judged", ">versions", ">worse versions"
    )
    rows.title = (
        f"Acceptance length over {number} requests of {num_kinds} kind{'s' if num_kinds > 1 else ''};"
        f" a candidate at the end has {learned(number - OURS.num_waiting):.3f}"
    )
    bar = progress.add_task(f"{number} requests, kinds: {num_kinds}", total=len(GATES) * streams)
    for gate in GATES:
        runs = []
        for n in range(streams):
            runs.append(Stream(number, num_kinds, gate, SEED + n).run())
            progress.advance(bar)
        rows.add_row(
            gate.name,
            f"{np.mean([np.mean(run.lengths[first - 1 :]) for run in runs]):.3f}",
            f"{np.mean([run.lengths[-1] for run in runs]):.3f}",
            f"{np.mean([run.num_judged for run in runs]):.1f}",
            f"{np.mean([run.num_versions for run in runs]):.1f}",
            f"{np.mean([run.num_worse for run in runs]):.2f}",
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=harness.positive, default=200, help="simulated streams of each row (200)")
    parser.add_argument(
        "--requests", type=harness.positive, nargs="+", default=[100, 400], help="of a stream (100 400)"
    )
    parser.add_argument("--kinds", type=harness.positive, nargs="+", default=[1, 5], help="of traffic (1 5)")
    arguments = parser.parse_args()
    try:
        with Bar(console=Console(stderr=True)) as progress:
            tables = [
                table(number, num_kinds, arguments.streams, progress)
                for num_kinds in arguments.kinds
                for number in arguments.requests
            ]
    except KeyboardInterrupt:
        sys.exit("Interrupted; there are no figures.")
    for rows in tables:
        output.console().print(rows)


if __name__ == "__main__":
    main()
