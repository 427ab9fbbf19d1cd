"""spec.rollout in the registry's words."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api.rollout import Rollout
from updraft_operator.planning.policy import is_followed, policy
from updraft_rollouts.policy import RolloutPolicy

analyses = st.fixed_dictionaries(
    {},
    optional={
        "intervalSeconds": st.integers(1, 86_400),
        "minSamples": st.integers(1, 1_000_000),
        "failureLimit": st.integers(0, 1_000_000),
        "maxAcceptanceRegressionPercent": st.integers(0, 100),
        "maxDomainRegressionPercent": st.integers(0, 100),
        "maxLatencyRegressionPercent": st.integers(0, 100),
        "onInconclusive": st.sampled_from(["Pause", "Rollback", "Promote"]),
        "dryRun": st.booleans(),
        "comparison": st.sampled_from(["Auto", "Pods", "Switchback"]),
        "switchbackSeconds": st.integers(2, 3600),
    },
)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    """Every one that the rules of the CRD let in."""
    strategy = draw(st.sampled_from(["Canary", "Immediate", "Manual"]))
    percents = sorted(draw(st.lists(st.integers(1, 100), min_size=strategy == "Canary", max_size=10)))
    steps = [{"podsPercent": percent, "holdSeconds": draw(st.integers(0, 5000))} for percent in percents]
    least_s = sum(step["holdSeconds"] for step in steps) if strategy == "Canary" else 30
    fields: dict[str, Any] = {
        "strategy": strategy,
        "steps": steps,
        "analysis": draw(analyses),
        "autoRollback": draw(st.booleans()),
        "progressDeadlineSeconds": draw(st.integers(max(30, least_s), 2_592_000)),
        "maxPodsSwapping": draw(st.none() | st.integers(1, 1_000_000)),
        "revisionHistoryLimit": draw(st.integers(1, 50)),
        "revisionHistoryMegabytes": draw(st.none() | st.integers(1, 1_000_000)),
    }
    return Rollout.model_validate(fields)


def _effective(desired: pb.RolloutPolicy, defaults: RolloutPolicy | None = None) -> pb.RolloutPolicy:
    """What a registry that was told so says that it follows."""
    return RolloutPolicy.from_proto(desired, defaults or RolloutPolicy()).to_proto()


@settings(deadline=None)
@given(rollout=rollouts())
def test_what_the_crd_lets_in_the_registry_can_follow(rollout: Rollout) -> None:
    desired = policy(rollout)
    assert is_followed(desired, _effective(desired))


@settings(deadline=None)
@given(rollout=rollouts(), other=rollouts())
def test_another_policy_is_told_until_the_registry_follows_it(rollout: Rollout, other: Rollout) -> None:
    desired, before = policy(rollout), _effective(policy(other))
    if not is_followed(desired, before):
        assert is_followed(desired, _effective(desired))
    elif rollout.steps:
        assert _effective(desired) == before


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"strategy": "Manual"}, id="strategy"),
        pytest.param({"steps": [{"podsPercent": 20}]}, id="steps"),
        pytest.param({"steps": [{"podsPercent": 10}, {"podsPercent": 50}, {"podsPercent": 60}]}, id="one more step"),
        pytest.param({"autoRollback": False}, id="false"),
        pytest.param({"maxPodsSwapping": 1}, id="pods"),
        pytest.param({"progressDeadlineSeconds": 901}, id="deadline"),
        pytest.param({"revisionHistoryLimit": 3}, id="history"),
        pytest.param({"revisionHistoryMegabytes": 8000}, id="megabytes"),
        pytest.param({"analysis": {"failureLimit": 0}}, id="zero"),
        pytest.param({"analysis": {"comparison": "Pods"}}, id="comparison"),
        pytest.param({"analysis": {"dryRun": True}}, id="dry run"),
    ],
)
def test_every_field_counts_in_both_directions(change: dict[str, Any]) -> None:
    plain, changed = policy(Rollout()), policy(Rollout.model_validate(change))
    assert not is_followed(changed, _effective(plain))
    assert not is_followed(plain, _effective(changed))


def test_the_registrys_own_choices_are_left_to_it() -> None:
    effective = _effective(policy(Rollout()))
    effective.offline_gate.min_samples = 99
    effective.analysis.confidence = 0.99
    assert is_followed(policy(Rollout()), effective)


def test_no_steps_leave_the_registrys_own() -> None:
    desired = policy(Rollout.model_validate({"strategy": "Immediate", "steps": []}))
    assert is_followed(desired, _effective(desired))
