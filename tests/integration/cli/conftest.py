"""A tiny model that the whole stack can serve, and a registry with something in it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.support.tiny_target import make_tiny_target
from tests.support.tiny_tokenizer import write_tokenizer

from updraft_cli.__main__ import cli

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(make_tiny_target(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The command line, away from what runs on this machine."""
    mine = ("REGISTRY", "SPECULATOR", "TOKEN_FILE", "CA_FILE", "CERT_FILE", "KEY_FILE", "REGISTRY_DATA_DIR")
    elsewhere = {f"UPDRAFT_{name}": None for name in mine}
    runner = CliRunner(env={**elsewhere, "UPDRAFT_DATA": str(tmp_path / "no-stack")})
    return lambda *arguments: runner.invoke(cli, [str(argument) for argument in arguments])
