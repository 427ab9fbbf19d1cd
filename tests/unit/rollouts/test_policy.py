"""Policies that cannot be followed."""

from typing import Any

import pytest

from updraft_rollouts.policy import Analysis, OfflineGate, RolloutPolicy, RolloutStep, problem
from updraft_rollouts.terms import Strategy

TENTH = RolloutStep(pods_percent=10, hold_seconds=60)


def test_the_default_can_be_followed() -> None:
    assert problem(RolloutPolicy()) == ""


@pytest.mark.parametrize("strategy", [Strategy.IMMEDIATE, Strategy.MANUAL])
def test_without_a_canary_its_deadline_does_not_matter(strategy: Strategy) -> None:
    assert problem(RolloutPolicy(strategy=strategy, progress_deadline_seconds=1, steps=())) == ""


def step(percent: int, hold_seconds: int = 60) -> RolloutStep:
    return RolloutStep(pods_percent=percent, hold_seconds=hold_seconds)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"steps": ()}, "steps is empty, but a canary needs at least one"),
        ({"steps": (step(0),)}, "pods_percent of step 1 is 0, expected 1 to 100"),
        ({"steps": (step(10), step(101))}, "pods_percent of step 2 is 101, expected 1 to 100"),
        ({"steps": (step(50), step(10))}, "pods_percent must not decrease from step to step, got 50 and then 10"),
        ({"steps": (step(1),) * 21}, "steps has 21 entries, expected at most 20"),
        ({"progress_deadline_seconds": 239}, "progress_deadline_seconds is 239, expected at least 240"),
        ({"progress_deadline_seconds": 10**9}, "progress_deadline_seconds is 1000000000"),
        ({"analysis": Analysis(confidence=1.0)}, "analysis.confidence is 1, expected more than 0 and less than 1"),
        ({"analysis": Analysis(confidence=float("nan"))}, "analysis.confidence is nan"),
        ({"analysis": Analysis(max_acceptance_regression_percent=101)}, "max_acceptance_regression_percent is 101"),
        ({"analysis": Analysis(max_latency_regression_percent=200)}, "max_latency_regression_percent is 200"),
        ({"analysis": Analysis(interval_seconds=0)}, "analysis.interval_seconds is 0, expected 1 to"),
        ({"analysis": Analysis(switchback_seconds=10**8)}, "analysis.switchback_seconds is 100000000"),
        ({"analysis": Analysis(min_samples=0)}, "analysis.min_samples is 0"),
        (
            {"offline_gate": OfflineGate(min_samples=1)},
            "offline_gate.min_samples is 1, expected at least 2",
        ),
        ({"offline_gate": OfflineGate(confidence=-0.5)}, "offline_gate.confidence is -0.5"),
        ({"offline_gate": OfflineGate(min_gain_percent=float("nan"))}, "offline_gate.min_gain_percent is nan"),
    ],
)
def test_what_cannot_be_followed_is_told(fields: dict[str, Any], why: str) -> None:
    assert why in problem(RolloutPolicy(**fields))


def test_equal_steps_may_follow_each_other() -> None:
    assert problem(RolloutPolicy(steps=(TENTH, TENTH))) == ""
