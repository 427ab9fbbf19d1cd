"""A tiny target and its traces, once for all tests here, and a registry for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.registry import RegistryProcess
from tests.support.tiny_target import make_tiny_target
from tests.support.traces import TraceMaker


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("trainer") / "target")


@pytest.fixture(scope="session")
def traces(tiny_target: Path) -> TraceMaker:
    return TraceMaker(tiny_target)


@pytest.fixture
def registry_port(tmp_path: Path) -> Iterator[int]:
    """Of a registry in a process of its own."""
    with RegistryProcess(tmp_path) as registry:
        yield registry.port
