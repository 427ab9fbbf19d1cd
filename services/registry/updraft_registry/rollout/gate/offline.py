"""The offline gate: does a candidate need fewer verify steps than the serving version for the same held-out tokens?

The gain is that for today's mix of traffic, and no kind of traffic may be surely worse.
`updraft_rollouts.evidence` estimates the gain; the trainer uses the same estimate before it publishes. Each candidate is
judged once, so no correction for repeated decisions is needed.
"""

from dataclasses import replace
from typing import NamedTuple

from updraft.registry.v1.registry_pb2 import Evaluation, EvaluationSample
from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.version import NO_DRAFT, name_of
from updraft_rollouts.evidence import Gain, Paired, gain, weighted, worse_kinds
from updraft_rollouts.policy import OfflineGate

MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
"""Bounds of a request's weight. Beyond, rounding would decide."""


class OfflineJudgement(NamedTuple):
    """A verdict, and the sentence that a person reads."""

    verdict: Verdict
    reason: str
    is_outdated: bool = False
    """It was compared with a version that no longer serves."""


def judge(evaluation: Evaluation | None, *, serving: int, policy: OfflineGate) -> OfflineJudgement:
    """Decide on a candidate. `serving` is the version that serves now; 0: none, so one token per step.

    Without a serving version, `min_gain_percent` has to cover the cost of drafting.
    """
    if evaluation is None:
        return OfflineJudgement(Verdict.HOLD, "it has no evaluation")
    problem = _malformed(evaluation)
    if problem:
        return OfflineJudgement(Verdict.HOLD, f"its evaluation is malformed: {problem}")
    if evaluation.baseline_version != serving:
        reason = f"compared with {name_of(evaluation.baseline_version)} but {name_of(serving)} serves"
        return OfflineJudgement(Verdict.HOLD, reason, is_outdated=True)
    pairs = _pairs(evaluation)
    num_samples = len(weighted(pairs))
    if num_samples < policy.min_samples:
        reason = f"evaluated on {num_samples} requests, at least {policy.min_samples} are required"
        return OfflineJudgement(Verdict.HOLD, reason)
    of_mix = pairs if _has_known_shares(evaluation) else [replace(pair, kind="") for pair in pairs]
    judgement = _weigh(gain(of_mix, policy.confidence), num_samples, serving, policy)
    losses = worse_kinds(pairs)
    if judgement.verdict is Verdict.PASS and losses:
        return OfflineJudgement(Verdict.FAIL, f"{judgement.reason}, but {losses[0]}")
    return judgement


def _has_known_shares(evaluation: Evaluation) -> bool:
    """Whether weights say how much of today's traffic each kind is; without, how many requests are of a kind is chance."""
    return all(sample.kind for sample in evaluation.samples) and any(sample.weight for sample in evaluation.samples)


def _pairs(evaluation: Evaluation) -> list[Paired]:
    """The requests; equal weights if the publisher gave none."""
    has_weights = any(sample.weight for sample in evaluation.samples)
    return [
        Paired(
            tokens=sample.tokens,
            candidate_steps=sample.candidate_steps,
            baseline_steps=sample.baseline_steps,
            kind=sample.kind or (f"domain:{sample.domain}" if sample.domain else ""),
            weight=sample.weight if has_weights else 1.0,
        )
        for sample in evaluation.samples
    ]


def _weigh(gain: Gain, num_samples: int, serving: int, policy: OfflineGate) -> OfflineJudgement:
    comparison = (
        f"acceptance length {gain.candidate:.2f} against {gain.baseline:.2f} of {name_of(serving)}, "
        f"gain {gain.percent:+.1f} % ({gain.low_percent:+.1f} to {gain.high_percent:+.1f} % "
        f"at {policy.confidence * 100:g} % confidence) over {num_samples} requests"
    )
    required = f"required gain of {policy.min_gain_percent:g} %"
    if gain.low_percent >= policy.min_gain_percent:
        return OfflineJudgement(Verdict.PASS, comparison)
    if gain.high_percent < policy.min_gain_percent:
        return OfflineJudgement(Verdict.FAIL, f"{comparison}: below the {required}")
    return OfflineJudgement(Verdict.HOLD, f"{comparison}: not enough evidence for the {required}")


def _malformed(evaluation: Evaluation) -> str:
    """First contradiction in the evaluation; empty if there is none."""
    trace_ids: set[str] = set()
    for sample in evaluation.samples:
        problem = _impossible(sample, evaluation)
        if problem:
            return f"{_name(sample)} {problem}"
        if sample.trace_id in trace_ids:
            return f"{_name(sample)} is counted twice"
        trace_ids.add(sample.trace_id)
    return ""


def _name(sample: EvaluationSample) -> str:
    """Quoted, because the publisher chose the id and terminals show the reason."""
    return f"request {sample.trace_id[:80]!r}" if sample.trace_id else "a request"


def _impossible(sample: EvaluationSample, evaluation: Evaluation) -> str:
    if not sample.trace_id:
        return "has no trace id"
    if sample.weight and not MIN_WEIGHT <= sample.weight <= MAX_WEIGHT:
        return f"has the weight {sample.weight:g}, expected 0 or {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
    if evaluation.baseline_version == NO_DRAFT and sample.baseline_steps != sample.tokens:
        return f"has {sample.baseline_steps} steps without a draft for {sample.tokens} tokens"
    steps = {"candidate": sample.candidate_steps, "baseline": sample.baseline_steps}
    for role, num_steps in steps.items():
        # Every verify step gives at least one token, and at most one more than it drafted.
        if not 1 <= num_steps <= sample.tokens:
            return f"has {num_steps} {role} steps for {sample.tokens} tokens"
        if evaluation.lookahead and num_steps * (evaluation.lookahead + 1) < sample.tokens:
            most = f"at most {evaluation.lookahead} draft tokens"
            return f"has {sample.tokens} tokens in {num_steps} {role} steps of {most}"
    return ""
