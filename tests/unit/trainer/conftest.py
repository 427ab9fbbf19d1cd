"""A tiny target and its traces, once for all tests here."""

from pathlib import Path

import pytest
from tests.support.tiny_target import make_tiny_target
from tests.support.traces import TraceMaker


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("trainer") / "target")


@pytest.fixture(scope="session")
def traces(tiny_target: Path) -> TraceMaker:
    return TraceMaker(tiny_target)
