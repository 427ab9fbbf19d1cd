"""Whether a policy can be followed: the one place that knows its bounds, for what comes by wire and for settings."""

from collections.abc import Iterator
from itertools import pairwise

from updraft_registry.rollout.version import Analysis, GatePolicy, Policy, Step, Strategy

_MAX_STEPS = 20
_MAX_S = 30 * 24 * 3600
"""A month: whoever writes more has mistaken the unit."""


def problem(policy: Policy) -> str:
    """What is wrong with a policy, in the words of the wire; empty if nothing is."""
    return next(_problems(policy), "")


def _problems(policy: Policy) -> Iterator[str]:
    if policy.strategy is Strategy.CANARY and not policy.steps:
        yield "steps is empty: a canary needs at least one"
    yield from _of_steps(policy.steps)
    holds_s = sum(step.hold_s for step in policy.steps) if policy.strategy is Strategy.CANARY else 1
    if not holds_s <= policy.progress_deadline_s <= _MAX_S:
        asked = f"the steps hold for {holds_s} s together, so at least that and at most {_MAX_S}"
        yield f"progress_deadline_seconds is {policy.progress_deadline_s}; {asked}"
    yield from _of_analysis(policy.analysis)
    yield from _of_gate(policy.gate)


def _of_steps(steps: tuple[Step, ...]) -> Iterator[str]:
    if len(steps) > _MAX_STEPS:
        yield f"steps has {len(steps)} entries; at most {_MAX_STEPS}"
    for number, step in enumerate(steps, start=1):
        if not 1 <= step.pods_percent <= 100:
            yield f"pods_percent of step {number} is {step.pods_percent}, expected 1 to 100"
    for before, after in pairwise(steps):
        if after.pods_percent < before.pods_percent:
            yield f"pods_percent of the steps must not decrease, got {before.pods_percent} and then {after.pods_percent}"


def _of_analysis(analysis: Analysis) -> Iterator[str]:
    if not 0.0 < analysis.confidence < 1.0:
        yield f"analysis.confidence is {analysis.confidence:g}, expected more than 0 and less than 1"
    for name, percent in (
        ("max_acceptance_regression_percent", analysis.max_acceptance_regression_percent),
        ("max_latency_regression_percent", analysis.max_latency_regression_percent),
    ):
        if not 0 <= percent <= 100:
            yield f"analysis.{name} is {percent}, expected 0 to 100"
    for name, seconds, least_s in (
        ("interval_seconds", analysis.interval_s, 1),
        ("switchback_seconds", analysis.switchback_s, 2),  # pods serve shorter slices as long as these
    ):
        if not least_s <= seconds <= _MAX_S:
            yield f"analysis.{name} is {seconds}, expected {least_s} to {_MAX_S}"
    if analysis.min_samples < 1:
        yield f"analysis.min_samples is {analysis.min_samples}; without a request there is nothing to compare"


def _of_gate(gate: GatePolicy) -> Iterator[str]:
    if gate.min_samples < 2:
        yield f"offline_gate.min_samples is {gate.min_samples}; two requests are the least to compare"
    if not 0.0 < gate.confidence < 1.0:
        yield f"offline_gate.confidence is {gate.confidence:g}, expected more than 0 and less than 1"
    if not -100.0 < gate.min_gain_percent < 1000.0:
        yield f"offline_gate.min_gain_percent is {gate.min_gain_percent:g}, expected -100 to 1000"
