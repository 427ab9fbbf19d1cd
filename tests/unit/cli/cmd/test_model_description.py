"""`updraft model describe`: what is read of a target."""

import json
from pathlib import Path

from click.testing import CliRunner
from tests.support.published_targets import make

from updraft_chassis.errors import InvalidInput
from updraft_cli.cmd.model import describe


def test_a_folder_is_described_in_rows(tmp_path: Path) -> None:
    make("gemma 4", tmp_path)
    result = CliRunner().invoke(describe, [str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = dict(line.split("  ", 1) for line in result.output.splitlines())
    assert rows["family"].strip() == "gemma4"
    assert rows["engine"].strip() == "sglang"
    assert rows["head"].strip() == "tied to the embedding, soft cap 30"
    assert rows["layers"].strip() == "8, a draft reads the inputs of 2, 4, 5"


def test_a_program_gets_all_of_it(tmp_path: Path) -> None:
    make("GLM 4.5", tmp_path)
    described = json.loads(CliRunner().invoke(describe, [str(tmp_path), "-o", "json"]).output)
    assert described["eos_token_ids"] == [151329, 151336]
    assert described["places"]["head"] == {"name": "lm_head.weight", "file": "model-00002-of-00002.safetensors"}


def test_what_cannot_be_described_is_refused(tmp_path: Path) -> None:
    make("GLM 4.5", tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    result = CliRunner().invoke(describe, [str(tmp_path)])
    assert isinstance(result.exception, InvalidInput)
    assert "lacks model-00001-of-00002.safetensors" in str(result.exception)
