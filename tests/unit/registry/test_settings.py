"""The registry's environment."""

from pathlib import Path

import pytest

from updraft_chassis.settings import load
from updraft_registry.settings import RegistrySettings
from updraft_registry.version import GatePolicy, Policy

DATA = {"UPDRAFT_REGISTRY_DATA_DIR": "/tmp/registry"}


def test_only_the_data_folder_has_no_default() -> None:
    settings = load(RegistrySettings, DATA)
    assert (settings.host, settings.port, settings.data_dir) == ("127.0.0.1", 50051, Path("/tmp/registry"))
    assert settings.policy == Policy()


def test_gate_and_history_become_the_default_policy() -> None:
    environ = DATA | {
        "UPDRAFT_REGISTRY_GATE_MIN_SAMPLES": "20",
        "UPDRAFT_REGISTRY_GATE_MIN_GAIN_PERCENT": "2.5",
        "UPDRAFT_REGISTRY_GATE_CONFIDENCE": "0.9",
        "UPDRAFT_REGISTRY_REVISION_HISTORY_LIMIT": "3",
    }
    gate = GatePolicy(min_samples=20, min_gain_percent=2.5, confidence=0.9)
    assert load(RegistrySettings, environ).policy == Policy(gate=gate, history_limit=3)


def test_every_problem_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"UPDRAFT_REGISTRY_PORT": "70000", "UPDRAFT_REGISTRY_GATE_CONFIDENCE": "1", "UPDRAFT_REGISTRY_PROT": "1"}
    with pytest.raises(SystemExit) as exit_:
        load(RegistrySettings, environ)
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    for name in ("UPDRAFT_REGISTRY_DATA_DIR", *environ):
        assert name in told
