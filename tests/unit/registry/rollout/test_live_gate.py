"""The live gate: three verdicts on what was compared, each with a sentence a person can act on."""

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from updraft_registry.rollout.comparison import Evidence, Ratio
from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.gate.live import judge
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
            "5 errors or crashes with the candidate against 24 with the stable version, limit 2: ",
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
