import json
from pathlib import Path

import pytest
from tests.support.checkpoints import draft

from updraft_artifacts.model_folder import PART_OF, target_fingerprint, tokenizer_fingerprint
from updraft_chassis.errors import InvalidInput


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "transformers_version": "5.0"}))
    (tmp_path / "model.safetensors").write_bytes(draft(1).data)
    return tmp_path


def test_a_resave_by_another_transformers_is_the_same_target(folder: Path) -> None:
    before = target_fingerprint(folder)
    (folder / "config.json").write_text(json.dumps({"transformers_version": "6.0", "hidden_size": 8}))
    assert target_fingerprint(folder) == before


def test_other_weights_or_sizes_are_another_target(folder: Path) -> None:
    before = target_fingerprint(folder)
    (folder / "model.safetensors").write_bytes(draft(2).data)
    weights = target_fingerprint(folder)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 16}))
    assert len({before, weights, target_fingerprint(folder)}) == 3


def test_a_tokenizer_is_known_by_its_file(folder: Path) -> None:
    none = tokenizer_fingerprint(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert tokenizer_fingerprint(folder) != none


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_holds_no_model_is_refused(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(InvalidInput):
        target_fingerprint(folder)
    with pytest.raises(InvalidInput):
        target_fingerprint(folder / "nowhere")


def test_a_part_of_a_model_has_the_fingerprint_that_it_states_or_none(folder: Path) -> None:
    (folder / PART_OF).write_text(json.dumps({"fingerprint": "sha256:whole"}))
    assert target_fingerprint(folder) == "sha256:whole"
    (folder / PART_OF).write_text("{}")
    with pytest.raises(InvalidInput, match="states no fingerprint: remove"):
        target_fingerprint(folder)
