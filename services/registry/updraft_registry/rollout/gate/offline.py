"""The offline gate: does a candidate need fewer verify steps than what serves now, for the same held-out
tokens?

The estimate, with the request as its unit and its interval, is `updraft_rollouts.evidence`; the trainer asks
it the same question before it publishes. Here is only what follows from it. One look per candidate, so no
correction for looking often.
"""

from dataclasses import dataclass

from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.version import NO_DRAFT, Evaluation, EvaluationSample, name_of
from updraft_rollouts.evidence import Gain, Paired, gain
from updraft_rollouts.policy import OfflineGate


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineJudgement:
    """A verdict, and the sentence that a person reads."""

    verdict: Verdict
    reason: str
    is_outdated: bool = False
    """It was compared with another version than the one that serves now: no fault of its own."""


def judge(evaluation: Evaluation | None, *, serving: int, policy: OfflineGate) -> OfflineJudgement:
    """Decide on a candidate. `serving` is the version that serves now; 0 = none, one token a step.

    Against no draft the gain has to pay for drafting as well: `min_gain_percent` is what drafting costs.
    """
    if evaluation is None:
        return OfflineJudgement(verdict=Verdict.HOLD, reason="it comes without an evaluation")
    problem = _malformed(evaluation)
    if problem:
        return OfflineJudgement(verdict=Verdict.HOLD, reason=f"its evaluation is malformed: {problem}")
    if evaluation.baseline_version != serving:
        reason = f"compared with {name_of(evaluation.baseline_version)} but {name_of(serving)} serves"
        return OfflineJudgement(verdict=Verdict.HOLD, reason=reason, is_outdated=True)
    num_samples = len(evaluation.samples)
    if num_samples < policy.min_samples:
        reason = f"evaluated on {num_samples} requests, at least {policy.min_samples} are needed"
        return OfflineJudgement(verdict=Verdict.HOLD, reason=reason)
    pairs = [
        Paired(tokens=s.tokens, candidate_steps=s.candidate_steps, baseline_steps=s.baseline_steps)
        for s in evaluation.samples
    ]
    return _weigh(gain(pairs, policy.confidence), num_samples, serving, policy)


def _weigh(gain: Gain, num_samples: int, serving: int, policy: OfflineGate) -> OfflineJudgement:
    told = (
        f"acceptance length {gain.candidate:.2f} against {gain.baseline:.2f} of {name_of(serving)}, "
        f"gain {gain.percent:+.1f} % ({gain.low_percent:+.1f} to {gain.high_percent:+.1f} % "
        f"at {policy.confidence * 100:g} % confidence) over {num_samples} requests"
    )
    asked = f"{policy.min_gain_percent:g} %"
    if gain.low_percent >= policy.min_gain_percent:
        return OfflineJudgement(verdict=Verdict.PASS, reason=told)
    if gain.high_percent < policy.min_gain_percent:
        return OfflineJudgement(verdict=Verdict.FAIL, reason=f"{told}: below the {asked} that is asked for")
    return OfflineJudgement(verdict=Verdict.HOLD, reason=f"{told}: not surely above the {asked} that is asked for")


def _malformed(evaluation: Evaluation) -> str:
    """The first thing that cannot be true of the evaluation; empty if there is none."""
    seen: set[str] = set()
    for sample in evaluation.samples:
        problem = _impossible(sample, evaluation)
        if problem:
            return f"{_name(sample)} {problem}"
        if sample.trace_id in seen:
            return f"{_name(sample)} is counted twice"
        seen.add(sample.trace_id)
    return ""


def _name(sample: EvaluationSample) -> str:
    """The publisher chose the id, and the reason is shown on terminals."""
    return f"request {sample.trace_id[:80]!r}" if sample.trace_id else "a request"


def _impossible(sample: EvaluationSample, evaluation: Evaluation) -> str:
    if not sample.trace_id:
        return "has no trace id"
    if evaluation.baseline_version == NO_DRAFT and sample.baseline_steps != sample.tokens:
        return f"has {sample.baseline_steps} steps without a draft for {sample.tokens} tokens"
    steps = {"candidate": sample.candidate_steps, "baseline": sample.baseline_steps}
    for who, num_steps in steps.items():
        # Every verify step gives at least one token, and at most one more than it drafted.
        if not 1 <= num_steps <= sample.tokens:
            return f"has {num_steps} {who} steps for {sample.tokens} tokens"
        if evaluation.lookahead and num_steps * (evaluation.lookahead + 1) < sample.tokens:
            most = f"at most {evaluation.lookahead} drafts"
            return f"has {sample.tokens} tokens in {num_steps} {who} steps of {most}"
    return ""
