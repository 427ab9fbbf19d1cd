"""The live gate: three verdicts on what was compared, each with a sentence a person can act on."""

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from updraft_registry.rollout.comparison import DomainEvidence, Evidence, Ratio, Served
from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.gate.live import judge, judge_without_baseline
from updraft_registry.rollout.speedup import Speedup
from updraft_registry.rollout.traffic import Both
from updraft_rollouts.policy import Analysis

ANALYSIS = Analysis()
NOISE = (0.01, -0.02, 0.02, -0.01, 0.0, 0.015, -0.015, 0.0)


def compared(
    acceptance: float,
    latency: float | None = 1.0,
    *,
    slices: int = 8,
    requests: int = 500,
    failures: tuple[int, int] = (0, 0),
) -> Evidence:
    """Evidence of a candidate that has these ratios to the stable version, with one or two percent of noise.

    The stable version has served ten times as many requests. `failures` are of both.
    """
    lengths = times = Ratio()
    for number in range(slices):
        noise = 1 + NOISE[number % len(NOISE)]
        lengths = lengths.plus(2.0 * acceptance * noise, 2.0)
        times = times.plus(0.02 * latency * noise, 0.02) if latency is not None else times
    return Evidence(
        acceptance=lengths,
        latency=times,
        slices=slices,
        candidate_requests=requests,
        baseline_requests=10 * requests,
        failures=failures[0],
        baseline_failures=failures[1],
        open=Evidence.begin(0).open,
    )


@pytest.mark.parametrize(
    ("evidence", "verdict", "why"),
    [
        pytest.param(compared(1.1), Verdict.PASS, "acceptance is significantly higher: 2.20 against 2.00", id="better"),
        pytest.param(
            compared(0.9), Verdict.FAIL, "acceptance is significantly lower by more than 2 %: 1.80", id="worse"
        ),
        pytest.param(compared(1.0), Verdict.HOLD, "acceptance is not significantly higher yet: ", id="the same"),
        pytest.param(compared(0.99), Verdict.HOLD, "acceptance is not significantly higher yet: ", id="a little worse"),
        pytest.param(
            compared(1.1, 1.2), Verdict.FAIL, "latency is significantly higher by more than 5 %: ", id="slower"
        ),
        pytest.param(
            compared(1.1, 1.055),
            Verdict.HOLD,
            "acceptance is significantly higher, but latency is higher by more",
            id="perhaps slower",
        ),
        pytest.param(
            compared(1.1, None),
            Verdict.HOLD,
            "acceptance is significantly higher, but latency is unknown",
            id="no latency",
        ),
        pytest.param(
            compared(1.1, requests=199),
            Verdict.HOLD,
            "acceptance is significantly higher, but 200 requests",
            id="few requests",
        ),
        pytest.param(
            compared(1.1, slices=3), Verdict.HOLD, "acceptance is not significantly higher yet", id="few slices"
        ),
        pytest.param(compared(1.0, slices=0), Verdict.HOLD, "waiting for traffic on both versions", id="nothing yet"),
        pytest.param(
            compared(1.1, failures=(3, 0)), Verdict.FAIL, "3 errors or crashes with the candidate", id="failing"
        ),
        pytest.param(
            compared(1.1, failures=(5, 24)),
            Verdict.FAIL,
            "5 errors or crashes with the candidate against 24 without it, limit 2: ",
            id="failing more often",
        ),
        pytest.param(compared(1.1, failures=(5, 25)), Verdict.PASS, "acc", id="what befalls both"),
        pytest.param(
            compared(1.1, failures=(2, 0)), Verdict.PASS, "acceptance is significantly higher", id="tolerated failures"
        ),
        pytest.param(
            compared(0.5, requests=40), Verdict.FAIL, "acceptance is significantly lower", id="disaster at once"
        ),
    ],
)
def test_a_candidate_is_judged_by_what_is_sure(evidence: Evidence, verdict: Verdict, why: str) -> None:
    judgement = judge(evidence, ANALYSIS)
    assert judgement.verdict is verdict
    assert judgement.reason.startswith(why)


@pytest.mark.parametrize(
    ("evidence", "is_tolerable"),
    [
        pytest.param(compared(1.0, slices=0), True, id="nothing yet"),
        pytest.param(compared(0.99, slices=2), True, id="hardly worse"),
        pytest.param(compared(0.95, slices=2), False, id="seems worse"),
        pytest.param(compared(1.1, 1.08, slices=2), False, id="seems slower"),
    ],
)
def test_what_seems_worse_than_allowed_is_not_tried_on_more_pods(evidence: Evidence, *, is_tolerable: bool) -> None:
    judgement = judge(evidence, ANALYSIS)
    assert judgement.verdict is Verdict.HOLD
    assert judgement.is_tolerable is is_tolerable


def test_the_sentence_has_the_numbers_their_bounds_and_how_much_was_seen() -> None:
    assert judge(compared(1.1, 0.95), ANALYSIS).reason == (
        "acceptance is significantly higher: 2.20 against 2.00 tokens per step, +10.0 % (+8.0 to +12.0 % at 95 %); "
        "19 against 20 ms per token, -5.0 % (-6.7 to -3.3 % at 95 %); 500 requests in 8 slices"
    )


def test_until_there_are_bounds_the_estimate_is_told_without() -> None:
    judgement = judge(compared(1.1, slices=1, requests=1), ANALYSIS)
    assert "2.22 against 2.00 tokens per step, +11.1 % (no bounds yet)" in judgement.reason
    assert judgement.reason.endswith("1 request in 1 slice")
    assert judgement.acceptance is not None
    assert judgement.acceptance.low_percent == -100.0
    assert judgement.acceptance.high_percent == float("inf")


def test_more_confidence_is_harder_to_convince() -> None:
    evidence = compared(1.02)
    assert judge(evidence, Analysis(confidence=0.9)).verdict is Verdict.PASS
    assert judge(evidence, Analysis(confidence=0.999)).verdict is Verdict.HOLD


@given(
    ratios=st.lists(st.tuples(st.floats(1e-30, 1e30), st.floats(1e-30, 1e30)), max_size=6),
    confidence=st.floats(0.001, 0.999),
)
@example(ratios=[(1e306, 1e-2), (1e-2, 1e306)] * 3, confidence=0.95)
def test_slices_that_contradict_each_other_are_judged_all_the_same(
    ratios: list[tuple[float, float]], confidence: float
) -> None:
    """Whatever pods report, a verdict comes of it: also of what was written before such reports were refused."""
    latency = Ratio()
    for candidate, stable in ratios:
        latency = latency.plus(candidate, stable)
    evidence = replace(compared(1.1), latency=latency, acceptance=latency)
    judgement = judge(evidence, Analysis(confidence=confidence))
    assert judgement.reason


def test_a_ratio_without_observations_is_not_known() -> None:
    assert Ratio().plus(2.0, None) == Ratio()


def in_domains(evidence: Evidence, changes: dict[str, float], *, slices: int = 20) -> Evidence:
    """The same, where the candidate has these ratios of acceptance in these domains, with a few percent of noise."""
    domains = {}
    for name, change in changes.items():
        lengths = Ratio()
        for number in range(slices):
            lengths = lengths.plus(2.0 * change * (1 + 2 * NOISE[number % len(NOISE)]), 2.0)
        domains[name] = DomainEvidence(acceptance=lengths, requests=500)
    return replace(evidence, domains=domains)


def test_a_candidate_that_is_surely_worse_in_one_domain_fails_however_good_its_mean() -> None:
    judgement = judge(in_domains(compared(1.1), {"chat": 1.12, "sql": 0.9}), ANALYSIS)
    assert judgement.verdict is Verdict.FAIL
    assert judgement.reason.startswith(
        "acceptance for 'sql' is significantly lower by more than 5 % (1.80 against 2.00 tokens per step): 2.20 against"
    )


def test_every_compared_domain_has_its_bounds_and_the_worst_is_first() -> None:
    found = judge(in_domains(compared(1.1), {"chat": 1.12, "sql": 0.9}), ANALYSIS).domains
    assert [domain.name for domain in found] == ["sql", "chat"]
    for domain in found:
        assert domain.estimate.low_percent < domain.estimate.change_percent < domain.estimate.high_percent


def test_while_it_looks_worse_in_a_domain_it_is_not_promoted() -> None:
    judgement = judge(in_domains(compared(1.1), {"chat": 1.12, "sql": 0.94}), ANALYSIS)
    assert judgement.verdict is Verdict.HOLD
    assert judgement.reason.startswith("acceptance is significantly higher, but lower for 'sql' by more than 5 % (1.88")


def test_a_domain_of_a_few_slices_delays_no_promotion() -> None:
    assert judge(in_domains(compared(1.1), {"sql": 0.9}, slices=3), ANALYSIS).verdict is Verdict.PASS


def test_a_loss_in_a_domain_within_the_limit_is_tolerated() -> None:
    evidence = in_domains(compared(1.1), {"sql": 0.96})
    assert judge(evidence, ANALYSIS).verdict is Verdict.PASS
    assert judge(evidence, replace(ANALYSIS, max_domain_regression_percent=2)).verdict is Verdict.FAIL


def test_many_domains_share_the_error_rate_of_one() -> None:
    """A loss that is sure where one domain is looked at is not sure where it is the worst of thirty."""
    loss = {"sql": 0.92}
    assert judge(in_domains(compared(1.1), loss, slices=12), ANALYSIS).verdict is Verdict.FAIL
    others = {f"d{n}": 1.1 for n in range(29)}
    assert judge(in_domains(compared(1.1), loss | others, slices=12), ANALYSIS).verdict is Verdict.HOLD


def test_a_domain_that_is_seen_shares_before_it_can_be_compared() -> None:
    """Otherwise the first to be compared would have the whole rate of errors for itself, and the next a half of it again."""
    loss = in_domains(compared(1.1), {"sql": 0.92}, slices=12)
    seen_only = {f"seen-{i}": DomainEvidence(requests=3) for i in range(31)}
    assert judge(loss, ANALYSIS).verdict is Verdict.FAIL
    assert judge(replace(loss, domains={**loss.domains, **seen_only}), ANALYSIS).verdict is Verdict.HOLD
    opened = replace(loss.open, pods={"a": Served(domains=dict.fromkeys(seen_only, Both()))})
    assert judge(replace(loss, open=opened), ANALYSIS).verdict is Verdict.HOLD


def test_a_hostile_name_of_a_domain_is_quoted_and_cut_in_the_reason() -> None:
    reason = judge(in_domains(compared(1.1), {"[red]" + "x" * 59: 0.8}), ANALYSIS).reason
    assert reason.startswith(f"acceptance for '[red]{35 * 'x'}' is")


@pytest.mark.parametrize(
    ("speedup", "verdict", "why"),
    [
        pytest.param((1.2, 1.1, 1.3), Verdict.PASS, "decoding is significantly faster", id="pays"),
        pytest.param((0.9, 0.8, 0.99), Verdict.FAIL, "decoding is significantly slower", id="costs"),
        pytest.param((1.1, 0.9, 1.3), Verdict.HOLD, "decoding is not significantly faster", id="not sure"),
        pytest.param(None, Verdict.PASS, "draft tokens are accepted", id="not measured"),
    ],
)
def test_against_no_draft_the_measured_speedup_decides(
    speedup: tuple[float, float, float] | None, verdict: Verdict, why: str
) -> None:
    measured = Speedup(ratio=speedup[0], low=speedup[1], high=speedup[2]) if speedup else None
    judgement = judge_without_baseline(compared(1.3, None, requests=40), ANALYSIS, measured)
    assert judgement.verdict is verdict
    assert judgement.reason.startswith(why)


def test_where_no_speedup_is_measured_acceptance_has_to_be_worth_a_draft() -> None:
    steady = Ratio()
    for number in range(8):
        steady = steady.plus(1.01 + 0.003 * (-1) ** number, 1.0)
    judgement = judge_without_baseline(replace(compared(1.3, None), acceptance=steady), ANALYSIS, None)
    assert judgement.verdict is Verdict.HOLD
    assert judgement.reason.startswith("acceptance is not surely above 1.05 tokens per step yet: 1.01 against 1.00")


@pytest.mark.parametrize(("slices", "why"), [(2, "waiting for traffic"), (8, "no draft token is surely accepted")])
def test_against_no_draft_a_speedup_without_acceptance_proves_nothing(slices: int, why: str) -> None:
    """It may be that of n-gram lookup."""
    judgement = judge_without_baseline(
        compared(1.0, None, slices=slices), ANALYSIS, Speedup(ratio=1.3, low=1.2, high=1.4)
    )
    assert (judgement.verdict, judgement.reason.startswith(why)) == (Verdict.HOLD, True)


def test_errors_of_a_single_pod_that_do_not_count_are_told() -> None:
    evidence = replace(compared(1.1, failures=(2, 0)), failures_by_pod={"a": 40})
    judgement = judge(evidence, ANALYSIS)
    assert judgement.verdict is Verdict.PASS
    assert "38 more errors of single pods not counted" in judgement.reason
