from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from updraft_rollouts.evidence import Paired
from updraft_trainer.publishing.decision import PublishDecision, PublishThresholds, decide
from updraft_trainer.publishing.estimate import GainEstimate

THRESHOLDS = PublishThresholds(min_samples=8, min_gain_percent=1.0, min_first_gain_percent=15.0, confidence=0.9)


def requests(
    num: int, *, candidate: int, baseline: int = 60, spread: int = 0, kind: str = "", weight: float = 1.0
) -> list[Paired]:
    """`num` requests of 100 tokens; every other one deviates by `spread` steps."""
    return [
        Paired(
            tokens=100,
            candidate_steps=candidate + spread * (-1) ** n,
            baseline_steps=baseline,
            kind=kind,
            weight=weight,
        )
        for n in range(num)
    ]


def estimate(*groups: Sequence[Paired], best_steps: Mapping[str, int] | None = None) -> GainEstimate:
    pairs = tuple(pair for group in groups for pair in group)
    return GainEstimate(
        trace_ids=tuple(str(n) for n in range(len(pairs))),
        domains=("",) * len(pairs),
        pairs=pairs,
        best_steps=best_steps or {},
    )


def decided(
    *groups: Sequence[Paired], version: int = 3, best_steps: Mapping[str, int] | None = None
) -> PublishDecision:
    return decide(
        estimate(*groups, best_steps=best_steps), subject="it", baseline_version=version, thresholds=THRESHOLDS
    )


@pytest.mark.parametrize(
    ("pairs", "version", "expected", "sentence"),
    [
        pytest.param(
            requests(12, candidate=50),
            3,
            True,
            "it is 20.0 % better than version 3 for today's traffic (+20.0 % to +20.0 %, 12 held-out requests)",
            id="better",
        ),
        pytest.param(
            requests(7, candidate=50),
            3,
            False,
            "it waits for 8 held-out requests of today's traffic, has 7",
            id="few requests",
        ),
        pytest.param([], 3, False, "it waits for 8 held-out requests of today's traffic, has 0", id="none"),
        pytest.param(requests(12, candidate=58, spread=20), 3, False, ": not sure yet", id="noise"),
        pytest.param(
            requests(1000, candidate=5960, baseline=6000, spread=1),
            3,
            False,
            ": not sure yet of a gain of 1 %",
            id="too small a gain",
        ),
        pytest.param(requests(12, candidate=61), 3, False, ": surely worse", id="worse"),
        pytest.param(
            requests(12, candidate=90, baseline=100), 0, False, ": a first version must gain 15 %", id="small first"
        ),
        pytest.param(
            requests(12, candidate=80, baseline=100),
            0,
            True,
            "it is 25.0 % better than no draft for today's traffic (+25.0 % to +25.0 %, 12 held-out requests)",
            id="first",
        ),
    ],
)
def test_a_draft_is_published_when_the_evidence_says_so(
    pairs: Sequence[Paired], version: int, *, expected: bool, sentence: str
) -> None:
    decision = decided(pairs, version=version)
    assert decision.should_publish is expected
    assert decision.sentence.endswith(sentence)


def test_todays_traffic_decides_and_not_what_is_held_out_of_older_traffic() -> None:
    old = requests(24, candidate=61, kind="content:0", weight=0.0)
    new = requests(8, candidate=50, kind="content:1", weight=4.0)
    assert decided(old, new).should_publish
    pooled = [requests(24, candidate=61), requests(8, candidate=50)]
    assert "3.0 % better" in decided(*pooled).sentence
    assert not decided(*pooled).should_publish


def test_a_draft_that_is_surely_worse_in_one_kind_is_not_published_however_good_its_mean() -> None:
    prose, code = (requests(n, candidate=c, kind=k) for n, c, k in ((20, 40, "domain:prose"), (8, 64, "domain:code")))
    decision = decided(prose, code)
    assert not decision.should_publish
    assert decision.sentence.endswith(", but surely worse for 'code' (-6.2 %, 8 requests)")


def test_a_kind_that_was_not_seen_for_long_may_lose_a_little_but_keeps_most() -> None:
    new = requests(12, candidate=50, kind="content:1")
    assert decided(new, requests(8, candidate=62, kind="content:0", weight=0.0)).should_publish
    decision = decided(new, requests(8, candidate=64, kind="content:0", weight=0.0))
    assert decision.sentence.endswith(", but surely worse for unnamed kind '0' (-6.2 %, 8 requests)")


def test_an_old_kind_is_compared_with_the_best_draft_it_had_so_it_does_not_get_worse_little_by_little() -> None:
    new = requests(12, candidate=50, kind="content:1")
    old = requests(8, candidate=62, kind="content:0", weight=0.0)
    best = {str(n): 58 for n in range(12, 20)}
    assert not decided(new, old, best_steps=best).should_publish


def test_few_requests_that_stand_for_most_of_todays_traffic_are_no_evidence() -> None:
    rare = requests(10, candidate=50, kind="content:0", weight=0.1)
    frequent = requests(2, candidate=50, kind="content:1", weight=5.5)
    assert decided(rare, frequent).sentence.endswith("has 12 that count as 2.4")


def test_evidence_on_a_small_part_of_todays_traffic_is_not_enough() -> None:
    assert decided(requests(10, candidate=50, weight=0.3)).sentence.endswith("has them for 30 % of it")


def test_a_draft_that_is_surely_worse_for_a_large_tenant_is_not_published_however_good_it_is_for_others() -> None:
    acme = [replace(one, tenant="ffffffffffffffff") for one in requests(6, candidate=70)]
    decision = decided(requests(30, candidate=40), acme)
    assert decision == PublishDecision(should_publish=False, sentence=decision.sentence)
    assert decision.sentence.endswith(", but surely worse for tenant ffffffffffffffff (-14.3 %, 6 requests)")
    assert decided(requests(30, candidate=40), [replace(one, tenant="") for one in acme]).should_publish
