"""`updraft size`: how large everything must be for a target."""

import json
from pathlib import Path

from click.testing import CliRunner
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
    assert len(rows) == 13
    stream = next(row for row in rows if row.startswith("stream"))
    assert "5 minutes of 10,000 captured tokens a second" in stream
    assert stream.endswith("spec.traces.maxSize, UPDRAFT_INFERENCE_CAPTURE_MAX_BYTES")
    assert any("Gi)" in row and row.endswith("spec.trainer.storage.size") for row in rows)


def test_a_program_gets_bytes_and_what_they_are_for(tmp_path: Path) -> None:
    make("GLM 4.5", tmp_path)

    def sized(*options: str) -> dict[str, dict[str, int]]:
        found = json.loads(CliRunner().invoke(size, [str(tmp_path), "-o", "json", *options]).output)
        assert found["model"] == str(tmp_path)
        return {**found["sizes"], "traffic": found["traffic"]}

    usual, long = sized(), sized("--request-tokens", "2064")
    assert usual["traffic"]["request_tokens"] == 1064
    assert long["captured_request"]["amount"] == 2064 * usual["captured_token"]["amount"]
    assert sized("--draft-vocab-size", "16")["version"]["amount"] < usual["version"]["amount"]


def test_what_is_no_target_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(size, [str(tmp_path)])
    assert isinstance(result.exception, InvalidInput)
