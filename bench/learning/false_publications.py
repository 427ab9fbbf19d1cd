"""How often does the trainer publish a draft that is no better? `python -m bench.learning.false_publications`. Simulated;
minutes of one core.

The draft that serves and the candidate are equally good for today's traffic, and differ by chance in each request. Each draw of
requests is judged by the trainer's own code: as if all were of one kind, with each kind as a stratum, and by the whole gate,
which also asks for a gain of 1 % and that no kind is surely worse. Two rows have a candidate that is a little worse or better.
The last row is a tenant for whom both are as good.
"""

import argparse
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from bench import harness
from bench.learning.arms import OURS
from bench.learning.learning import SEED
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from updraft_cli import output
from updraft_rollouts.evidence import KIND_CONFIDENCE, MAX_LOSS_PERCENT, Paired, gain, worse_tenants
from updraft_trainer.publishing.decision import decide
from updraft_trainer.publishing.estimate import GainEstimate

DRAWS = 3000
CONFIDENCE = OURS.thresholds.confidence
NORMAL_90 = 1.645
TEMPLATE_TOKENS, TEMPLATE_STEPS = 20, (9, 10, 10, 10)
FOUR_OLD = (10, 9, 7, 4)
TENANT_REQUESTS, TENANT_DIFFERENCE = 16, 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Requests of one kind that judge a candidate. `share` is the kind's share of today's traffic, `ratio` the candidate's
    verify steps over those of the draft that serves. Answers from a template have equally many tokens, and drafts mostly agree
    on them."""

    count: int
    share: float
    ratio: float = 1.0
    is_templated: bool = False


def equal(num_kinds: int, count: int) -> list[Group]:
    """Kinds of equal shares, with `count` requests each."""
    return [Group(count=count, share=1 / num_kinds)] * num_kinds


def shifted(new: int, share: float, old: Sequence[int], *, faster: float = 1.2) -> list[Group]:
    """`new` requests of a new kind, in which the candidate is better by a factor, and `old` ones of others, in which it is as
    much worse as makes both equal."""
    ratio = 1 / faster
    others = (1 - share * ratio) / (1 - share)
    return [
        Group(count=new, share=share, ratio=ratio),
        *(Group(count=count, share=(1 - share) * count / sum(old), ratio=others) for count in old),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Requests that judge a candidate. With `num_recent` the shares of traffic are counted in so many requests, not known."""

    name: str
    groups: Sequence[Group]
    num_recent: int = 0


CASES = (
    Case(name="24 of one kind", groups=equal(1, 24)),
    Case(name="10 of each of 4 kinds", groups=equal(4, 10)),
    Case(name="4 of each of 8 kinds", groups=equal(8, 4)),
    Case(
        name="10 of a new kind, a quarter of the mix, 20 % better there; 30 of 4 old ones",
        groups=shifted(10, 0.25, FOUR_OLD),
    ),
    Case(name="the same, half of the mix", groups=shifted(10, 0.5, FOUR_OLD)),
    Case(name="the same, half of the mix, 4 of the new kind", groups=shifted(4, 0.5, FOUR_OLD)),
    Case(name="8 of a new kind, a quarter of the mix; 3 of each of 4 old ones", groups=shifted(8, 0.25, (3, 3, 3, 3))),
    Case(
        name="4 answers of 20 tokens from a template, three quarters of the mix; 4 of each of 2 kinds",
        groups=[Group(count=4, share=0.75, is_templated=True), *[Group(count=4, share=0.125)] * 2],
    ),
    Case(
        name="10 of a new kind, a quarter of the mix as 64 requests show it, 20 % better there; 30 of 4 old ones",
        groups=shifted(10, 0.25, FOUR_OLD),
        num_recent=64,
    ),
    Case(name="the same, 60 % better there", groups=shifted(10, 0.25, FOUR_OLD, faster=1.6), num_recent=64),
)

UNEQUAL = (
    Case(name="24 of one kind, 1 % worse", groups=[Group(count=24, share=1.0, ratio=1.01)]),
    Case(name="24 of one kind, 1 % better", groups=[Group(count=24, share=1.0, ratio=1 / 1.01)]),
)


def draw(case: Case, rng: random.Random) -> list[Paired]:
    """One draw of the requests that judge; their weights are 1 on average."""
    shares = [group.share for group in case.groups]
    if case.num_recent:
        seen = rng.choices(range(len(shares)), shares, k=case.num_recent)
        shares = [seen.count(n) / case.num_recent for n in range(len(shares))]
    total = sum(group.count for group in case.groups)
    return [
        replace(_request(rng, group, str(n)), weight=share * total / group.count)
        for n, (group, share) in enumerate(zip(case.groups, shares, strict=True))
        for _ in range(group.count)
    ]


def draw_tenant(rng: random.Random) -> list[Paired]:
    """Requests of one tenant, whose kinds are chance: the candidate gains in one what it loses in the other."""
    groups = [Group(count=1, share=0.5, ratio=1 + sign * TENANT_DIFFERENCE) for sign in (-1, 1)]
    return [
        replace(_request(rng, groups[n], str(n)), tenant="a")
        for n in (rng.randrange(2) for _ in range(TENANT_REQUESTS))
    ]


def _request(rng: random.Random, group: Group, kind: str) -> Paired:
    """Lengths are lognormal, as people's requests are. Both drafts share how hard the request is."""
    if group.is_templated:
        candidate, serving = (rng.choice(TEMPLATE_STEPS) for _ in range(2))
        return Paired(tokens=TEMPLATE_TOKENS, candidate_steps=candidate, baseline_steps=serving, kind=kind)
    tokens, length = int(rng.lognormvariate(5.0, 0.8)) + 20, rng.uniform(1.5, 3.0)
    candidate, serving = (
        max(1, round(tokens / length * rng.uniform(0.8, 1.2) * ratio)) for ratio in (group.ratio, 1.0)
    )
    return Paired(tokens=tokens, candidate_steps=candidate, baseline_steps=serving, kind=kind)


def looks_better(pairs: Sequence[Paired]) -> bool:
    """Whether the interval lies above a gain of zero."""
    return gain(pairs, CONFIDENCE).low_percent > 0.0


def is_published(pairs: Sequence[Paired]) -> bool:
    """The decision of the whole gate, over a draft that serves."""
    trace_ids = tuple(str(n) for n in range(len(pairs)))
    estimate = GainEstimate(trace_ids=trace_ids, domains=("",) * len(pairs), pairs=tuple(pairs))
    return decide(estimate, subject="it", baseline_version=1, thresholds=OURS.thresholds).should_publish


def is_worse_off(pairs: Sequence[Paired]) -> bool:
    """As the trainer judges a tenant, but with kinds as strata."""
    return gain(pairs, KIND_CONFIDENCE).high_percent < -MAX_LOSS_PERCENT


def as_one_kind(pairs: Sequence[Paired]) -> list[Paired]:
    """The same requests, with nothing known about their kinds."""
    return [replace(one, kind="") for one in pairs]


Verdict = Callable[[list[Paired]], bool]

VERDICTS: Sequence[Verdict] = (lambda pairs: looks_better(as_one_kind(pairs)), looks_better, is_published)
OF_A_TENANT: Sequence[Verdict] = (lambda pairs: bool(worse_tenants(pairs)), is_worse_off)


def measured(draws: int, progress: Progress) -> Table:
    """Shares of draws with a wrong verdict, by case."""
    noise = 100 * NORMAL_90 * math.sqrt(0.05 * 0.95 / draws)
    rows = output.table("judged by", ">as one kind", ">kinds as strata", ">published")
    rows.title = (
        f"An equal draft looks better, or is published: share of {draws:,} draws (5 % is known to {noise:.1f} points)"
    )
    bar = progress.add_task("draws", total=draws * (len(CASES) + len(UNEQUAL) + 1))

    def add(name: str, verdicts: Sequence[Verdict], drawn: Callable[[random.Random], list[Paired]]) -> None:
        rng, counts = random.Random(f"{SEED}/{name}"), [0] * len(verdicts)
        for _ in range(draws):
            pairs = drawn(rng)
            counts = [count + verdict(pairs) for count, verdict in zip(counts, verdicts, strict=True)]
            progress.advance(bar)
        rows.add_row(name, *(f"{100 * count / draws:.1f} %" for count in counts))

    for case in (*CASES, *UNEQUAL):
        add(case.name, VERDICTS, partial(draw, case))
    add(f"{TENANT_REQUESTS} of a tenant of two kinds, 40 % better or worse: surely worse off", OF_A_TENANT, draw_tenant)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--draws", type=harness.positive, default=DRAWS, help=f"simulated draws of each row ({DRAWS:,})"
    )
    arguments = parser.parse_args()
    try:
        with Progress(console=Console(stderr=True)) as progress:
            rows = measured(arguments.draws, progress)
    except KeyboardInterrupt:
        sys.exit("Interrupted; there are no figures.")
    output.console().print(rows)


if __name__ == "__main__":
    main()
