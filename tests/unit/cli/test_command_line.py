"""What can be said of the command line without anything running."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from updraft_cli.__main__ import cli
from updraft_cli.folders import cache_folder, data_folder


@pytest.mark.parametrize(
    "command",
    [[], ["up"], ["status"], ["model"], ["model", "fetch"], ["draft"]]
    + [["draft", name] for name in ("list", "show", "pin", "unpin", "pull")],
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
        pytest.param(["status", "-o", "yaml"], id="unknown format"),
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
