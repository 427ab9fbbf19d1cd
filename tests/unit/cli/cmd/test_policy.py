"""A policy as a file, as flags, and in words."""

from textwrap import dedent

import click
import pytest
import yaml
from tests.support.registry_answers import POLICY, screen

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import InvalidInput
from updraft_cli import output
from updraft_cli.backends.policy import Analysis, OfflineGate, Policy, Step, read
from updraft_cli.cmd.policy import view
from updraft_cli.cmd.policy.commands import FLAGS, StepType
from updraft_cli.cmd.policy.durations import DURATION
from updraft_rollouts.terms import OnInconclusive, Strategy

FILE = """
strategy: canary
steps:
- {pods_percent: 10, hold_seconds: 120}
- {pods_percent: 50, hold_seconds: 90}
analysis:
  confidence: 0.95
  on_inconclusive: pause
  comparison: switchback
max_pods_swapping: 2
"""


def test_what_the_registry_says_comes_back_as_it_was() -> None:
    assert Policy.from_proto(POLICY).to_proto() == POLICY


def test_what_is_shown_as_yaml_can_be_set_as_a_file() -> None:
    policy = Policy.from_proto(POLICY)
    shown = output.as_yaml(output.plain(policy))
    assert read(shown, "policy.yaml") == policy
    assert yaml.safe_load(shown)["steps"][0] == {"pods_percent": 10, "hold_seconds": 120}


def test_a_file_becomes_the_registrys_message_and_what_it_leaves_out_stays_open() -> None:
    message = read(FILE, "policy.yaml").to_proto()
    assert message == pb.RolloutPolicy(
        strategy=pb.STRATEGY_CANARY,
        steps=[pb.RolloutStep(pods_percent=10, hold_seconds=120), pb.RolloutStep(pods_percent=50, hold_seconds=90)],
        analysis=pb.Analysis(
            confidence=0.95, on_inconclusive=pb.ON_INCONCLUSIVE_PAUSE, comparison=pb.COMPARISON_SWITCHBACK
        ),
        max_pods_swapping=2,
    )
    assert not message.analysis.HasField("failure_limit")
    assert not message.HasField("auto_rollback")


def test_the_names_of_kubernetes_are_understood_too() -> None:
    file = "{strategy: Canary, steps: [{podsPercent: 10, holdSeconds: 60}], analysis: {onInconclusive: Rollback}}"
    policy = read(file, "spec")
    assert policy.steps == (Step(pods_percent=10, hold_seconds=60),)
    assert (policy.strategy, policy.analysis and policy.analysis.on_inconclusive) == (
        Strategy.CANARY,
        OnInconclusive.ROLLBACK,
    )


def test_what_a_newer_crd_allows_is_ignored_as_a_field_and_named_as_a_value() -> None:
    assert Policy.from_kubernetes({"strategy": "Manual", "blueGreen": {}}).strategy is Strategy.MANUAL
    with pytest.raises(
        InvalidInput, match=r"^spec\.rollout is of another version of Updraft: strategy: .* 'BlueGreen'$"
    ):
        Policy.from_kubernetes({"strategy": "BlueGreen"})


def test_a_strategy_of_a_newer_registry_is_none_that_is_known() -> None:
    assert Policy.from_proto(pb.RolloutPolicy(strategy=9)).strategy is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        pytest.param("strategy: [", "policy.yaml is not YAML: ", id="no yaml"),
        pytest.param("canary", "policy.yaml is not a policy: expected names and values", id="no mapping"),
        pytest.param("stratgy: canary", "policy.yaml: there is no stratgy", id="misspelt"),
        pytest.param(
            "strategy: blue", "policy.yaml: strategy: input should be 'canary', 'immediate' or 'manual'", id="enum"
        ),
        pytest.param(
            "steps: [{pods_percent: ten}]", "steps.1.pods_percent: input should be a valid integer", id="type"
        ),
        pytest.param("steps: [{pods_percent: ten}]", "steps.1.hold_seconds is missing", id="all that is wrong"),
        pytest.param("max_pods_swapping: -1", "max_pods_swapping: input should be greater than", id="negative"),
    ],
)
def test_a_file_that_is_none_is_refused_with_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        read(text, "policy.yaml")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_changes_are_told_by_their_path() -> None:
    before = Policy.from_proto(POLICY)
    after = before.with_changes(
        {"strategy": "immediate", "analysis.failure_limit": 0, "steps": [{"pods_percent": 5, "hold_seconds": 10}]}
    )
    assert after.to_proto().analysis.failure_limit == 0
    assert {path: (old, new) for path, old, new in after.changes(before)} == {
        "strategy": ("canary", "immediate"),
        "analysis.failure_limit": (2, 0),
        "steps": (
            [{"pods_percent": 10, "hold_seconds": 120}, {"pods_percent": 50, "hold_seconds": 90}],
            [{"pods_percent": 5, "hold_seconds": 10}],
        ),
    }
    assert list(before.changes(before)) == []


def test_a_policy_is_shown_in_words() -> None:
    assert screen(view.rendered(Policy.from_proto(POLICY), is_wide=False)) == dedent("""\
        strategy      canary: a version that passes the offline gate is tried on some
                      pods first
        steps         10 % of the pods for 2 min, then 50 % for 1 min 30 s
        compared      by pods; up to two pods, by switchback with turns of 20 s
        promoted      when acceptance is significantly higher (95 % confidence, one
                      observation every 30 s), after 200 requests or more
        rolled back   when acceptance is significantly lower by more than 2 %, latency
                      is significantly higher by more than 5 %, acceptance in one domain
                      is significantly lower by more than 5 %, or after more than 2
                      failures
        deadline      without a verdict within 15 min, it is rolled back
        swaps         all pods at the same time
        keeps         10 versions in addition to those in use
        offline gate  a gain of 1 % at 80 % confidence, over 8 held-out requests""")


def test_rules_for_canaries_are_told_without_one_only_when_asked_for() -> None:
    policy = Policy.from_proto(POLICY).with_changes(
        {"strategy": "immediate", "auto_rollback": False, "analysis.dry_run": True}
    )
    assert "steps" not in screen(view.rendered(policy, is_wide=False))
    wide = screen(view.rendered(policy, is_wide=True), 200)
    assert "automatic rollback is off" in wide
    assert "dry run" in wide


def test_every_value_has_a_flag() -> None:
    paths = {
        f"{name}.{inner}" if inner else name
        for name, inner in [(name, "") for name in Policy.model_fields]
        + [("analysis", name) for name in Analysis.model_fields]
        + [("offline_gate", name) for name in OfflineGate.model_fields]
    }
    assert set(FLAGS) | {"steps", "analysis", "offline_gate"} == paths


@pytest.mark.parametrize(
    ("said", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("15 min", 900), ("1H", 3600), ("2d", 172_800)]
)
def test_lengths_of_time_are_understood(said: str, seconds: int) -> None:
    assert DURATION.convert(said, None, None) == seconds


@pytest.mark.parametrize("said", ["", "soon", "-1s", "1.5h", "99999d"])
def test_a_length_of_time_that_is_none_is_refused(said: str) -> None:
    with pytest.raises(click.BadParameter):
        DURATION.convert(said, None, None)


@pytest.mark.parametrize(("said", "percent"), [("10:2m", 10), ("10%:120", 10)])
def test_steps_are_understood(said: str, percent: int) -> None:
    assert StepType().convert(said, None, None) == {"pods_percent": percent, "hold_seconds": 120}


@pytest.mark.parametrize("said", ["10", "ten:2m", "10:", "10:soon"])
def test_a_step_that_is_none_is_refused(said: str) -> None:
    with pytest.raises(click.BadParameter):
        StepType().convert(said, None, None)
