"""`draft train` before it starts any process: what it refuses, what it asks for, and how it shows progress."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from updraft.registry.v1 import registry_pb2
from updraft_chassis.progress import Progress
from updraft_cli.__main__ import cli
from updraft_cli.cmd.draft import parts, training

Started = list[tuple[str, list[str]]]


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Parts that would run, and their arguments."""
    runs: Started = []

    def run(part: str, arguments: Iterable[object], _: object) -> None:
        words = list(map(str, arguments))
        runs.append((part, words))
        if part == "trainer":
            folder = Path(words[words.index("--output") + 1])
            folder.mkdir()
            (folder / "manifest.json").write_text("{}")

    monkeypatch.setattr(parts, "run", run)
    return runs


def train(model: Path, *arguments: object) -> Result:
    return CliRunner().invoke(cli, ["draft", "train", "--target", str(model), *map(str, arguments)])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"prompt": "Why?"}))
    return path


def test_without_anything_to_learn_from_it_names_the_three_sources(tmp_path: Path, started: Started) -> None:
    result = train(tmp_path, "--output", tmp_path / "draft")
    assert result.exit_code == 2
    assert "Name what to learn from: --prompts, --traces or --self-play." in result.stderr
    assert started == []


def test_prompts_are_answered_and_their_recordings_learned_from(
    tmp_path: Path, prompts: Path, started: Started
) -> None:
    result = train(tmp_path, "--prompts", prompts, "--output", tmp_path / "draft", "--max-tokens", 99, "--epochs", 7)
    assert result.exit_code == 0, result.output
    recordings = f"{tmp_path}/draft-recordings"
    (engine, asked), (trainer, learned) = started
    assert (engine, trainer) == ("inference", "trainer")
    shared = ["--model", str(tmp_path)]
    answers = ["--max-tokens", "99", "--temperature", "0.0", "--seed", "0", "--context", "2048"]
    assert asked == ["record", *shared, "--recordings", recordings, "--prompts", str(prompts), *answers]
    assert learned == [
        *("offline", *shared, "--output", f"{tmp_path}/draft", "--traces", recordings),
        *("--epochs", "7", "--origin", "answers to questions.jsonl", "--region", ""),
    ]


def test_traces_need_no_engine(tmp_path: Path, started: Started) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    result = train(tmp_path, "--traces", folders[0], "--traces", folders[1], "--output", tmp_path / "draft")
    assert result.exit_code == 0, result.output
    ((part, words),) = started
    assert part == "trainer"
    assert [words[n + 1] for n, word in enumerate(words) if word == "--traces"] == list(map(str, folders))
    assert words[words.index("--origin") + 1] == f"traces of {folders[0]}, traces of {folders[1]}"
    assert not (tmp_path / "draft-recordings").exists()


def test_sources_add_up(tmp_path: Path, prompts: Path, started: Started) -> None:
    (tmp_path / "a").mkdir()
    sources = ("--prompts", prompts, "--self-play", 24, "--traces", tmp_path / "a")
    assert train(tmp_path, *sources, "--output", tmp_path / "draft").exit_code == 0
    (_, asked), (_, learned) = started
    assert {"--prompts", "--self-play"} <= set(asked)
    assert learned.count("--traces") == 2
    origin = learned[learned.index("--origin") + 1]
    assert origin == f"answers to questions.jsonl, traces of {tmp_path}/a, 24 requests of self-play"


def test_a_folder_for_recordings_without_requests_to_record_is_refused(tmp_path: Path, started: Started) -> None:
    (tmp_path / "a").mkdir()
    given = ("--traces", tmp_path / "a", "--recordings", tmp_path / "b", "--output", tmp_path / "draft")
    result = train(tmp_path, *given)
    assert result.exit_code == 2
    assert "--recordings needs --prompts or --self-play; to learn from a folder, use --traces." in result.stderr
    assert started == []


@pytest.mark.parametrize("option", ["--prompts", "--traces"])
def test_a_source_that_is_not_there_is_refused(tmp_path: Path, option: str, started: Started) -> None:
    result = train(tmp_path, option, tmp_path / "none", "--output", tmp_path / "draft")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
    assert started == []


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
    with parts.shown() as show:
        for done in range(3):
            show(Progress(activity="recording", done=done, total=3))
        show(Progress(activity="judging", done=0, total=1))
    assert capsys.readouterr().err.splitlines() == ["recording: 0 of 3", "judging: 0 of 1"]


def test_speed_is_told_once_tokens_were_generated() -> None:
    assert parts._speed(Progress(activity="recording", done=3, total=3), 2.0) == ""
    assert parts._speed(Progress(activity="recording", done=3, total=3, tokens=100), 2.0) == "50 tokens/s"


def test_the_time_that_is_left_follows_from_the_parts_of_this_run() -> None:
    assert parts._left(Progress(activity="training", done=30, total=50), 20, 60.0) == "0:02:00 left"
    assert parts._left(Progress(activity="training", done=20, total=50), 20, 0.0) == ""


def test_a_note_is_shown_once_and_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with parts.shown() as show:
        show(Progress(activity="training", done=1, total=2, note="Going on from step 1 of 2 [red]."))
        show(Progress(activity="training", done=2, total=2))
    assert capsys.readouterr().err.splitlines() == ["Going on from step 1 of 2 [red].", "training: 1 of 2"]


def test_the_estimate_has_an_interval_where_there_are_requests_enough_for_one() -> None:
    samples = [
        registry_pb2.EvaluationSample(tokens=100 + n, candidate_steps=50, baseline_steps=100 + n) for n in range(8)
    ]
    shown = training._interval(registry_pb2.Evaluation(samples=samples))
    assert shown == "; 104 to 110 % more, with 90 % confidence"
    assert training._interval(registry_pb2.Evaluation(samples=samples[:2])) == ""
