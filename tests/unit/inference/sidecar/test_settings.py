"""What the process is told, by variables and arguments."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_inference.settings import InferenceSettings
from updraft_trainer.settings import TrainerSettings


def test_only_an_agent_beside_sglang_has_the_url_of_a_server(tmp_path: Path) -> None:
    for engine in ("torch", "vllm"):
        with pytest.raises(ValidationError, match="requires ENGINE sglang"):
            InferenceSettings(model=tmp_path, engine=engine, attach="http://127.0.0.1:30000")
    InferenceSettings(model=tmp_path, engine="sglang", attach="http://127.0.0.1:30000")
    InferenceSettings(model=tmp_path, engine="sglang")


def test_a_drafter_that_sglang_has_not_is_refused(tmp_path: Path) -> None:
    for drafter in ("none", "ngram", "hybrid"):
        with pytest.raises(ValidationError, match=f"DRAFTER {drafter} requires ENGINE torch"):
            InferenceSettings(model=tmp_path, engine="sglang", drafter=drafter)
    InferenceSettings(model=tmp_path, engine="sglang", drafter="eagle3")


def test_the_socket_is_below_the_data_unless_another_is_named(tmp_path: Path) -> None:
    for engine in ("sglang", "vllm"):
        beside = InferenceSettings(model=tmp_path, data_dir=tmp_path, engine=engine)
        assert beside.socket_path == tmp_path / f"{engine}.sock"
    assert InferenceSettings(model=tmp_path, engine="vllm", vllm_socket=tmp_path / "v").socket_path == tmp_path / "v"
    named = InferenceSettings(model=tmp_path, engine="sglang", sglang_socket=tmp_path / "s")
    assert named.socket_path == tmp_path / "s"


@pytest.mark.parametrize(("setting", "value"), [("draft_path", "/x"), ("api_keys_file", "/x"), ("tenant_header", "x")])
@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_what_only_a_process_in_front_of_clients_can_do_is_refused(
    tmp_path: Path, engine: str, setting: str, value: str
) -> None:
    with pytest.raises(ValidationError, match=f"API_KEYS_FILE and TENANT_HEADER require ENGINE torch: with {engine}"):
        InferenceSettings(model=tmp_path, engine=engine, **{setting: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [field.name for field in fields(ShapeChoice)])
def test_the_first_draft_takes_the_sizes_that_a_trainer_takes(name: str) -> None:
    ours, theirs = InferenceSettings.model_fields[name], TrainerSettings.model_fields[name]
    assert ours.default == theirs.default
    assert _least(InferenceSettings, name) == _least(TrainerSettings, name)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "updraft_inference", *arguments],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_arguments_win_over_variables_and_are_checked_with_them(tmp_path: Path) -> None:
    arguments = ("--engine", "torch", "--attach", "http://127.0.0.1:30000")
    done = run(*arguments, UPDRAFT_INFERENCE_MODEL=str(tmp_path), UPDRAFT_INFERENCE_ENGINE="sglang")

    assert done.returncode == 2
    assert "ATTACH requires ENGINE sglang" in done.stderr


def _least(cls: type[BaseSettings], name: str) -> int:
    least: int = cls.model_json_schema()["properties"][name]["anyOf"][0]["minimum"]
    return least
