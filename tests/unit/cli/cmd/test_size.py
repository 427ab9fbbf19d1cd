"""`updraft size`: how large everything must be for a target."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.support import families
from tests.support.published_targets import make

from updraft_chassis.errors import InvalidInput
from updraft_cli.cmd.size import size


def test_every_size_of_a_folder_has_an_amount_a_reason_and_its_setting(
    tmp_path: Path,
) -> None:
    make("GLM 4.5", tmp_path)
    result = CliRunner().invoke(size, [str(tmp_path), "--tokens-per-second", "10000"])
    assert result.exit_code == 0, result.output
    heading, *rows = result.output.splitlines()
    assert heading.split() == ["size", "amount", "reason", "setting"]
    assert len(rows) == 14
    stream = next(row for row in rows if row.startswith("stream"))
    assert "5 minutes of 10,000 captured tokens per second" in stream
    assert stream.endswith("spec.traces.maxSize, UPDRAFT_INFERENCE_CAPTURE_MAX_BYTES")
    assert any("Gi)" in row and row.endswith("spec.trainer.storage.size") for row in rows)


def test_a_program_gets_bytes_and_what_they_are_for(tmp_path: Path) -> None:
    make("GLM 4.5", tmp_path)

    def sized(*options: str) -> dict[str, dict[str, int]]:
        found = json.loads(CliRunner().invoke(size, [str(tmp_path), "-o", "json", *options]).output)
        assert found["model"] == str(tmp_path)
        return {**found["sizes"], "traffic": found["traffic"]}

    usual, long = sized(), sized("--answer-tokens", "2000", "--prompt-rows", "0")
    assert (usual["traffic"]["answer_tokens"], usual["traffic"]["prompt_rows"]) == (1000, 512)
    assert long["captured_request"]["amount"] == 2000 * usual["captured_token"]["amount"]


@pytest.mark.parametrize(
    ("name", "least"),
    [("num-attention-heads", 1), ("num-key-value-heads", 1), ("intermediate-size", 1), ("vocab-size", 16)],
)
def test_a_draft_has_the_sizes_that_a_resource_can_name(tmp_path: Path, name: str, least: int) -> None:
    make("GLM 4.5", tmp_path)

    def version_bytes(size_of_one: int) -> int:
        options = ["--draft-num-key-value-heads", "1", f"--draft-{name}", str(size_of_one)]
        return int(
            json.loads(CliRunner().invoke(size, [str(tmp_path), "-o", "json", *options]).output)["sizes"]["version"][
                "amount"
            ]
        )

    assert version_bytes(least) < version_bytes(4 * least)


def test_a_draft_vocabulary_that_no_other_part_accepts_is_refused(tmp_path: Path) -> None:
    make("GLM 4.5", tmp_path)
    result = CliRunner().invoke(size, [str(tmp_path), "--draft-vocab-size", "15"])
    assert result.exit_code == 2
    assert "15 is not in the range x>=16" in result.output


def test_a_target_that_the_torch_engine_does_not_run_is_sized_for_sglang(tmp_path: Path) -> None:
    make("MiniMax M2, FP8", tmp_path / "minimax")
    families.make("qwen3", tmp_path / "qwen")

    def engine_of(model: str, *options: str) -> str:
        output = CliRunner().invoke(size, [str(tmp_path / model), "-o", "json", *options]).output
        return str(json.loads(output)["traffic"]["engine"])

    assert (engine_of("minimax"), engine_of("qwen")) == ("sglang", "torch")
    assert [engine_of("qwen", "--engine", engine) for engine in ("sglang", "vllm")] == ["sglang", "vllm"]


def test_heads_that_do_not_divide_are_refused_as_by_the_trainer(tmp_path: Path) -> None:
    make("GLM 4.5", tmp_path)
    options = ["--draft-num-attention-heads", "3", "--draft-num-key-value-heads", "2"]
    result = CliRunner().invoke(size, [str(tmp_path), *options])
    assert isinstance(result.exception, InvalidInput)
    assert "3 attention heads do not divide into 2 key-value heads" in str(result.exception)


def test_what_is_no_target_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(size, [str(tmp_path)])
    assert isinstance(result.exception, InvalidInput)
