"""The offline gate: three verdicts, each with a sentence. How sure an estimate is: tests of `evidence`."""

from dataclasses import replace

import pytest
from tests.support.versions import evaluation

from updraft.registry.v1.registry_pb2 import Evaluation, EvaluationSample
from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.gate.offline import judge
from updraft_rollouts.policy import OfflineGate

POLICY = OfflineGate(min_samples=8, min_gain_percent=1.0, confidence=0.8)


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        pytest.param(2.4, Verdict.PASS, id="clearly better"),
        pytest.param(1.6, Verdict.FAIL, id="clearly worse"),
        pytest.param(2.0, Verdict.FAIL, id="the same"),
    ],
)
def test_a_candidate_is_judged_by_its_acceptance_length(candidate: float, verdict: Verdict) -> None:
    judgement = judge(evaluation(candidate, against=4), serving=4, policy=POLICY)
    assert judgement.verdict is verdict
    assert f"acceptance length {candidate:.2f} against 2.00 of version 4" in judgement.reason
    assert "over 12 requests" in judgement.reason


def test_a_gain_that_only_one_request_shows_is_held() -> None:
    one_lucky = evaluation(2.0, against=4)
    one_lucky.samples[0].candidate_steps = 10
    judgement = judge(one_lucky, serving=4, policy=POLICY)
    assert judgement.verdict is Verdict.HOLD
    assert "not enough evidence for the required gain of 1 %" in judgement.reason


def _of_kinds(*kinds: tuple[str, float, float, int]) -> Evaluation:
    """Requests of kinds: name, acceptance length against 2.0, weight and number."""
    whole = Evaluation(baseline_version=4)
    for kind, length, weight, num_samples in kinds:
        for one in evaluation(length, against=4, num_samples=num_samples).samples:
            one.trace_id, one.kind, one.weight = f"{kind}-{one.trace_id}", kind, weight
            whole.samples.append(one)
    return whole


def test_the_gain_is_that_for_todays_mix_of_traffic() -> None:
    judgement = judge(_of_kinds(("domain:old", 1.95, 0.0, 24), ("domain:new", 2.4, 4.0, 8)), serving=4, policy=POLICY)
    assert judgement.verdict is Verdict.PASS
    assert "acceptance length 2.40 against 2.00 of version 4" in judgement.reason
    assert "over 8 requests" in judgement.reason


def test_a_candidate_that_is_surely_worse_in_one_kind_fails_however_good_its_mean() -> None:
    judgement = judge(_of_kinds(("domain:prose", 2.8, 1.0, 24), ("domain:code", 1.8, 1.0, 8)), serving=4, policy=POLICY)
    assert judgement.verdict is Verdict.FAIL
    assert judgement.reason.endswith(", but surely worse for 'code' (-10.0 %, 8 requests)")


def test_requests_of_kinds_without_weights_are_judged_as_if_of_one_kind() -> None:
    """How many of them are of each kind is chance, so that the draft gains in one kind only is doubt."""
    kinds = [("domain:a", 2.6, 8), ("domain:b", 2.0, 8)]
    with_shares, without = (
        judge(_of_kinds(*((kind, length, weight, n) for kind, length, n in kinds)), serving=4, policy=POLICY).reason
        for weight in (1.0, 0.0)
    )
    assert "gain +13.1 % (+12.8 to +13.4 % " in with_shares
    assert "gain +13.1 % (" in without
    assert "(+12.8 to " not in without


def test_weights_at_their_limits_give_a_verdict() -> None:
    whole = _of_kinds(("domain:a", 2.4, 1e6, 1), ("domain:b", 2.4, 1e-6, 8))
    whole.samples[0].tokens, whole.samples[0].candidate_steps, whole.samples[0].baseline_steps = (2**32 - 1,) * 3
    assert judge(whole, serving=4, policy=POLICY).verdict is Verdict.FAIL


def test_requests_that_are_not_of_todays_traffic_do_not_make_evidence_enough() -> None:
    judgement = judge(_of_kinds(("domain:old", 2.4, 0.0, 24), ("domain:new", 2.4, 4.0, 7)), serving=4, policy=POLICY)
    assert judgement.reason == "evaluated on 7 requests, at least 8 are required"


def test_a_comparison_with_a_version_that_no_longer_serves_is_held() -> None:
    judgement = judge(evaluation(3.0, against=3), serving=4, policy=POLICY)
    assert judgement.verdict is Verdict.HOLD
    assert judgement.reason == "compared with version 3 but version 4 serves"


def test_a_comparison_with_no_draft_is_held_once_a_version_serves() -> None:
    judgement = judge(evaluation(3.0, against=0), serving=1, policy=POLICY)
    assert judgement.reason == "compared with no draft but version 1 serves"


def test_against_no_draft_the_gain_must_pay_for_drafting() -> None:
    cheap = replace(POLICY, min_gain_percent=10.0)
    assert judge(evaluation(1.05, against=0), serving=0, policy=cheap).verdict is Verdict.FAIL
    passed = judge(evaluation(1.4, against=0), serving=0, policy=cheap)
    assert passed.verdict is Verdict.PASS
    assert "against 1.00 of no draft" in passed.reason


def test_too_few_requests_are_held_with_both_numbers() -> None:
    judgement = judge(evaluation(3.0, against=4, num_samples=7), serving=4, policy=POLICY)
    assert judgement.verdict is Verdict.HOLD
    assert judgement.reason == "evaluated on 7 requests, at least 8 are required"


def test_a_candidate_without_an_evaluation_is_held() -> None:
    judgement = judge(None, serving=4, policy=POLICY)
    assert judgement.verdict is Verdict.HOLD
    assert judgement.reason == "it has no evaluation"


def sample(**values: float | str) -> EvaluationSample:
    fields = {"trace_id": "t", "tokens": 10, "candidate_steps": 5, "baseline_steps": 6} | values
    return EvaluationSample(**fields)  # type: ignore[arg-type] # keyword by keyword, on purpose


@pytest.mark.parametrize(
    ("samples", "baseline", "lookahead", "problem"),
    [
        pytest.param([sample(trace_id="")], 4, 0, "a request has no trace id", id="no id"),
        pytest.param([sample(), sample()], 4, 0, "request 't' is counted twice", id="twice"),
        pytest.param(
            [sample(trace_id="\x1b[2J\n" + "x" * 10_000, tokens=0)],
            4,
            0,
            "request '\\x1b[2J\\n" + "x" * 75 + "' has 5 candidate steps for 0 tokens",
            id="an id that is no id",
        ),
        pytest.param(
            [sample(weight=-1.0)], 4, 0, "has the weight -1, expected 0 or 1e-06 to 1e+06", id="a weight below 0"
        ),
        pytest.param([sample(weight=float("nan"))], 4, 0, "has the weight nan, expected 0", id="a weight that is none"),
        pytest.param([sample(tokens=0)], 4, 0, "has 5 candidate steps for 0 tokens", id="no tokens"),
        pytest.param([sample(candidate_steps=0)], 4, 0, "has 0 candidate steps for 10 tokens", id="no candidate steps"),
        pytest.param(
            [sample(baseline_steps=11)],
            4,
            0,
            "has 11 baseline steps for 10 tokens",
            id="steps that gave no token",
        ),
        pytest.param(
            [sample(candidate_steps=2)],
            4,
            3,
            "has 10 tokens in 2 candidate steps of at most 3 draft tokens",
            id="magic",
        ),
        pytest.param(
            [sample()],
            0,
            0,
            "has 6 steps without a draft for 10 tokens",
            id="more than a token a step undrafted",
        ),
    ],
)
def test_an_evaluation_that_cannot_be_true_is_held_with_the_reason(
    samples: list[EvaluationSample], baseline: int, lookahead: int, problem: str
) -> None:
    evaluation = Evaluation(baseline_version=baseline, samples=samples, lookahead=lookahead)
    judgement = judge(evaluation, serving=baseline, policy=POLICY)
    assert judgement.verdict is Verdict.HOLD
    assert judgement.reason.startswith("its evaluation is malformed: ")
    assert problem in judgement.reason
