"""The plan of several AdaptiveSpeculators, without a cluster."""

import json
from pathlib import Path

import pytest

from updraft_operator import commands

SPECULATOR = """apiVersion: updraft.dev/v1alpha1
kind: AdaptiveSpeculator
metadata: {name: %s}
spec: {targetModel: {uri: "hf://org/model"}}
"""


def test_a_plan_covers_every_document_of_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two.yaml").write_text("---\n".join(SPECULATOR % name for name in ("one", "two")))
    (tmp_path / "three.yaml").write_text(SPECULATOR % "three" + "---\nkind: Secret\n")
    files = [word for name in ("two.yaml", "three.yaml") for word in ("-f", str(tmp_path / name))]
    with pytest.raises(SystemExit) as ended:
        commands.main(["plan", *files, "--offline", "--output", "json"])
    assert ended.value.code == 3
    planned = {each["metadata"]["name"] for each in json.loads(capsys.readouterr().out)}
    assert {"one-serving", "two-serving", "three-serving"} <= planned


def test_a_plan_without_serving_pods_explains_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serving = "engine: {type: SGLang, tensorParallelSize: 4}, targetModel"
    (tmp_path / "four.yaml").write_text((SPECULATOR % "four").replace("targetModel", serving))
    with pytest.raises(SystemExit):
        commands.main(["plan", "-f", str(tmp_path / "four.yaml"), "--offline"])
    shown = capsys.readouterr()
    assert "four-serving" not in shown.out
    assert shown.err.startswith("updraft-operator: default/four: spec.engine.tensorParallelSize is 4, but ")


def test_a_plan_of_no_speculator_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.yaml").write_text("kind: Secret\n")
    with pytest.raises(SystemExit) as ended:
        commands.main(["plan", "-f", str(tmp_path / "other.yaml"), "--offline"])
    assert ended.value.code == 1
    assert "other.yaml contains no AdaptiveSpeculator" in capsys.readouterr().err


@pytest.mark.parametrize("metadata", ["[chat]", "chat"])
def test_a_plan_of_metadata_that_is_no_object_fails_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metadata: str
) -> None:
    (tmp_path / "bad.yaml").write_text(f"kind: AdaptiveSpeculator\nmetadata: {metadata}\n")
    with pytest.raises(SystemExit) as ended:
        commands.main(["plan", "-f", str(tmp_path / "bad.yaml"), "--offline"])
    assert ended.value.code == 1
    assert "bad.yaml: metadata is not an object" in capsys.readouterr().err


def test_a_plan_of_a_speculator_without_a_name_names_the_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("kind: AdaptiveSpeculator\nmetadata:\n")
    with pytest.raises(SystemExit) as ended:
        commands.main(["plan", "-f", str(tmp_path / "bad.yaml"), "--offline"])
    assert ended.value.code == 1
    assert "metadata.name" in capsys.readouterr().err
