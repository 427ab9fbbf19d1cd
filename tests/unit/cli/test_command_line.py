"""What can be said of the command line without anything running."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from updraft_cli.__main__ import cli
from updraft_cli.local.folders import cache_folder, data_folder


def _commands(group: click.Group) -> Iterator[list[str]]:
    yield []
    for name, command in group.commands.items():
        found = _commands(command) if isinstance(command, click.Group) else [[]]
        yield from ([name, *rest] for rest in found)


@pytest.mark.parametrize(
    "command",
    sorted(_commands(cli)),
    ids=" ".join,
)
def test_every_command_explains_itself(command: list[str]) -> None:
    result = CliRunner().invoke(cli, [*command, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith("Usage:")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["draft", "pin", "one"], id="not a number"),
        pytest.param(["draft", "show", "0"], id="no draft has no details"),
        pytest.param(["up", "--port", "70000"], id="no port"),
        pytest.param(["up", "--set", "UPDRAFT_TRAINER_SEED"], id="a setting without a value"),
        pytest.param(["up", "--model", "/no/such/folder"], id="no such folder"),
        pytest.param(["draft", "list", "-o", "xml"], id="unknown format"),
        pytest.param(["draft", "show", "newest"], id="no word for a version"),
        pytest.param(["rollout", "policy", "sett"], id="no such command"),
        pytest.param(["rollout", "policy", "set"], id="nothing to set"),
        pytest.param(["rollout", "policy", "set", "--step", "10"], id="a step without its hold"),
        pytest.param(["rollout", "policy", "set", "--confidence", "95"], id="a confidence in percent"),
        pytest.param(["rollout", "watch", "--timeout", "soon"], id="no length of time"),
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, arguments).exit_code == 2


def test_a_model_folder_that_is_none_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["up", "--model", str(tmp_path), "--data", str(tmp_path / "data")])
    assert result.exit_code == 1
    assert result.output == f"Error: {tmp_path} is no model folder in Hugging Face layout: it has no config.json\n"


def test_the_command_line_imports_no_torch() -> None:
    code = "import sys, updraft_cli.__main__; print({'torch', 'numpy', 'gguf'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_folders_follow_the_xdg_variables_and_ignore_relative_ones() -> None:
    assert data_folder({"XDG_DATA_HOME": "/data"}) == Path("/data/updraft")
    assert data_folder({"XDG_DATA_HOME": "data"}) == Path.home() / ".local/share/updraft"
    assert cache_folder({}) == Path.home() / ".cache/updraft"


def test_the_options_of_a_registry_stand_apart_in_the_help() -> None:
    own, _, shared = CliRunner().invoke(cli, ["draft", "list", "--help"]).output.partition("\nRegistry:\n")
    assert "--output" in own
    assert "--registry" not in own
    assert "UPDRAFT_TOKEN_FILE" in shared


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_taught_our_commands(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert f"_UPDRAFT_COMPLETE={shell}_complete" in result.output
