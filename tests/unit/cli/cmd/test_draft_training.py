"""`draft train` before it starts any process: what it refuses, and how it shows progress."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from updraft_chassis.progress import Progress
from updraft_cli.__main__ import cli
from updraft_cli.cmd.draft import training


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object) -> None:
        raise AssertionError("nothing may start")

    monkeypatch.setattr(training, "_run", started)


def train(model: Path, *arguments: object) -> Result:
    return CliRunner().invoke(cli, ["draft", "train", str(model), *map(str, arguments)])


@pytest.mark.parametrize("number", [0, -1, 23, 1001, 10**12])
def test_a_number_that_cannot_work_is_refused(tmp_path: Path, number: int) -> None:
    result = train(tmp_path, "--self-play", number, "--output", tmp_path / "draft")
    assert result.exit_code == 2
    assert f"{number} is not in the range 24<=x<=1000" in result.stderr
    assert not (tmp_path / "draft").exists()


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = train(tmp_path / "none", "--self-play", 24, "--output", tmp_path / "draft")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


def test_a_folder_that_holds_something_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "model.safetensors").write_text("mine")
    result = train(tmp_path, "--self-play", 24, "--output", tmp_path / "draft")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {tmp_path}/draft is not empty: name a new folder with --output\n"


@pytest.mark.parametrize(("option", "written"), [("--output", "a"), ("--recordings", "a/b")])
def test_a_folder_that_cannot_be_written_to_is_told_before_any_work(tmp_path: Path, option: str, written: str) -> None:
    (tmp_path / "file").write_text("in the way")
    folders = {"--output": tmp_path / "draft", option: tmp_path / "file" / "a" / "b"}
    result = train(tmp_path, "--self-play", 24, *(word for pair in folders.items() for word in pair))
    assert result.exit_code == 1
    assert result.stderr == f"Error: cannot write to {tmp_path}/file/{written}: Not a directory\n"


def test_a_log_gets_a_line_for_each_activity_and_not_for_each_request(capsys: pytest.CaptureFixture[str]) -> None:
    with training._shown() as show:
        for done in range(3):
            show(Progress(activity="recording", done=done, total=3))
        show(Progress(activity="judging", done=0, total=1))
    assert capsys.readouterr().err.splitlines() == ["recording: 0 of 3", "judging: 0 of 1"]


def test_speed_is_told_once_tokens_were_generated() -> None:
    assert training._speed(Progress(activity="recording", done=3, total=3), 2.0) == ""
    assert training._speed(Progress(activity="recording", done=3, total=3, tokens=100), 2.0) == "50 tokens/s"
