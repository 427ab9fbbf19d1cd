"""The registry's environment."""

from pathlib import Path

import pytest

from updraft_chassis.settings import load
from updraft_registry.settings import RegistrySettings
from updraft_rollouts.policy import Analysis, OfflineGate, RolloutPolicy, RolloutStep
from updraft_rollouts.terms import OnInconclusive, Strategy

DATA = {"UPDRAFT_REGISTRY_DATA_DIR": "/tmp/registry"}


def test_only_the_data_folder_has_no_default() -> None:
    settings = load(RegistrySettings, DATA)
    assert (settings.host, settings.port, settings.data_dir) == ("127.0.0.1", 50051, Path("/tmp/registry"))
    assert settings.policy == RolloutPolicy()


def test_versions_of_a_405b_target_are_accepted() -> None:
    assert load(RegistrySettings, DATA).max_draft_bytes > 9_640_000_000


def test_gate_and_history_become_the_default_policy() -> None:
    environ = DATA | {
        "UPDRAFT_REGISTRY_GATE_MIN_SAMPLES": "20",
        "UPDRAFT_REGISTRY_GATE_MIN_GAIN_PERCENT": "2.5",
        "UPDRAFT_REGISTRY_GATE_CONFIDENCE": "0.9",
        "UPDRAFT_REGISTRY_REVISION_HISTORY_LIMIT": "3",
    }
    gate = OfflineGate(min_samples=20, min_gain_percent=2.5, confidence=0.9)
    assert load(RegistrySettings, environ).policy == RolloutPolicy(offline_gate=gate, revision_history_limit=3)


def test_the_rollout_is_set_by_the_environment_too() -> None:
    environ = DATA | {
        "UPDRAFT_REGISTRY_STRATEGY": "Manual",
        "UPDRAFT_REGISTRY_ROLLOUT_STEPS": "5:60,25:0,100:30",
        "UPDRAFT_REGISTRY_PROGRESS_DEADLINE_SECONDS": "120",
        "UPDRAFT_REGISTRY_MAX_PODS_SWAPPING": "4",
        "UPDRAFT_REGISTRY_AUTO_ROLLBACK": "false",
        "UPDRAFT_REGISTRY_ANALYSIS_INTERVAL_SECONDS": "10",
        "UPDRAFT_REGISTRY_ANALYSIS_MIN_SAMPLES": "50",
        "UPDRAFT_REGISTRY_ANALYSIS_CONFIDENCE": "0.99",
        "UPDRAFT_REGISTRY_ANALYSIS_ON_INCONCLUSIVE": "Pause",
    }
    assert load(RegistrySettings, environ).policy == RolloutPolicy(
        strategy=Strategy.MANUAL,
        steps=tuple(
            RolloutStep(pods_percent=percent, hold_seconds=hold_seconds)
            for percent, hold_seconds in ((5, 60), (25, 0), (100, 30))
        ),
        analysis=Analysis(interval_seconds=10, min_samples=50, confidence=0.99, on_inconclusive=OnInconclusive.PAUSE),
        auto_rollback=False,
        progress_deadline_seconds=120,
        max_pods_swapping=4,
    )


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ("half of them", "UPDRAFT_REGISTRY_ROLLOUT_STEPS: String should match pattern"),
        ("50:10,10:10", "invalid rollout settings: pods_percent must not decrease"),
        ("10:1000", "progress_deadline_seconds is 900, expected at least 1000"),
    ],
)
def test_a_rollout_that_cannot_be_followed_is_told(steps: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(RegistrySettings, DATA | {"UPDRAFT_REGISTRY_ROLLOUT_STEPS": steps})
    assert why in capsys.readouterr().err


def test_every_problem_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"UPDRAFT_REGISTRY_PORT": "70000", "UPDRAFT_REGISTRY_GATE_CONFIDENCE": "1", "UPDRAFT_REGISTRY_PROT": "1"}
    with pytest.raises(SystemExit) as exit_:
        load(RegistrySettings, environ)
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    for name in ("UPDRAFT_REGISTRY_DATA_DIR", *environ):
        assert name in printed


SOME_ACCOUNT = {"accounts": "serve:team/qwen-serving"}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"issuer": "https://a.example"}, "require an issuer, a key set and accounts"),
        ({"key_set": "/keys"}, "require an issuer, a key set and accounts"),
        (SOME_ACCOUNT, "require an issuer, a key set and accounts"),
        ({"issuer": "https://a.example", "key_set": "/keys"}, "no ServiceAccount may call"),
        ({"issuer": "https://a.example", "key_set": "http://a.example/jwks", **SOME_ACCOUNT}, "without TLS"),
        ({"issuer": "https://a.example", "key_set": "/keys", "accounts": "boss:team/qwen"}, "roles read, serve"),
    ],
)
def test_half_an_identity_is_refused(values: dict[str, str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(RegistrySettings, DATA | {f"UPDRAFT_REGISTRY_{name.upper()}": value for name, value in values.items()})
    assert problem in capsys.readouterr().err


def test_metrics_with_tls_need_a_certificate() -> None:
    with pytest.raises(ValueError, match="METRICS_TLS requires TLS_CERT_FILE and TLS_KEY_FILE"):
        RegistrySettings(data_dir=Path(), metrics_tls=True)
