"""What a manifest says of a folder, read without torch, and folders that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import json_format
from tests.support import checkpoints
from tests.support.checkpoints import OTHER_TARGET, TARGET, VOCABULARY, checkpoint
from tests.support.tiny_target import make_draft, make_tiny_target, save_draft

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import Corrupt, InvalidInput
from updraft_cli.models.importing import Claim, claim_of_model, read
from updraft_draft import checkpoint as drafts

KNOWN = Claim(where="the versions of default", target=TARGET)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as an engine loads it: no manifest."""
    (tmp_path / "model.safetensors").write_bytes(checkpoints.draft(1).data)
    (tmp_path / "config.json").write_text(checkpoints.CONFIG)
    return tmp_path


def with_manifest(folder: Path, **fields: Any) -> Path:
    manifest = checkpoints.draft(1).manifest(**fields)
    (folder / "manifest.json").write_text(json_format.MessageToJson(manifest))
    return folder


def test_the_manifest_is_that_of_the_bytes(folder: Path) -> None:
    made, expected = read(folder, "default", [KNOWN]), checkpoints.draft(1).manifest(tokenizer_fingerprint="")
    made.ClearField("provenance")
    assert made == expected


def test_a_draft_of_the_trainer_gets_the_manifest_that_the_trainer_would_give_it(tmp_path: Path) -> None:
    target = make_tiny_target(tmp_path / "target")
    network = make_draft(target)
    digest = save_draft(network, tmp_path / "draft")
    made = read(tmp_path / "draft", "default", [claim_of_model(target)])
    assert made.tensors_digest == digest
    assert list(made.tensors) == drafts.tensor_specs(drafts.checkpoint_tensors(network))
    assert made.draft_vocabulary_fingerprint == drafts.vocabulary_fingerprint(network.token_ids)


def test_a_folder_of_another_registry_keeps_its_origin_and_leaves_numbers_behind(folder: Path) -> None:
    provenance = pb.Provenance(samples=7, code_version="updraft/0.0.9")
    with_manifest(folder, parent_version=6, evaluation=checkpoints.evaluation(baseline=6), provenance=provenance)
    made = read(folder, "other")
    assert (made.speculator, made.target_fingerprint, made.provenance) == ("other", TARGET, provenance)
    assert (made.parent_version, made.HasField("evaluation")) == (0, False)
    assert made.source == pb.SOURCE_IMPORTED


def test_without_anybody_who_knows_the_target_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidInput, match=r"is unknown: .* name the model's folder with --target"):
        read(folder, "default", [Claim(where="the versions of default")])


def test_what_is_said_of_the_target_has_to_agree(folder: Path) -> None:
    with pytest.raises(InvalidInput, match=r"for another target: .*manifest\.json has sha256:a.*default has sha256:b"):
        read(with_manifest(folder), "default", [Claim(where="the versions of default", target=OTHER_TARGET)])


def test_the_vocabulary_is_that_of_the_weights(folder: Path) -> None:
    with_manifest(folder, draft_vocabulary_fingerprint="sha256:other")
    assert read(folder, "default", [KNOWN]).draft_vocabulary_fingerprint == VOCABULARY


def test_a_manifest_of_other_weights_is_refused(folder: Path) -> None:
    with_manifest(folder, digest=OTHER_TARGET)
    with pytest.raises(Corrupt, match="belongs to other weights"):
        read(folder, "default", [KNOWN])


def test_a_manifest_that_is_none_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")
    with pytest.raises(InvalidInput, match="is not a manifest of a draft"):
        read(folder, "default", [KNOWN])


def test_a_folder_with_other_files_is_refused_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "consolidated.bin").write_bytes(b"")
    with pytest.raises(InvalidInput, match=r"has no model\.safetensors.*; it holds consolidated\.bin"):
        read(tmp_path, "default", [KNOWN])


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = make_draft(make_tiny_target(tmp_path / "target"))
    with torch.no_grad():
        network.norm.weight[3] = torch.nan
    save_draft(network, tmp_path / "draft")
    with pytest.raises(InvalidInput, match=r"norm\.weight of the draft holds values that are not finite"):
        read(tmp_path / "draft", "default", [KNOWN])


def test_weights_without_a_vocabulary_are_no_draft(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(checkpoint({"fc.weight": ("F32", (1,), bytes(4))}).data)
    with pytest.raises(InvalidInput, match="is not an EAGLE-3 draft: it lacks its vocabulary, the integer tensor d2t"):
        read(folder, "default", [KNOWN])


@pytest.mark.parametrize("config", ["", "[]", None], ids=["no json", "no object", "no file"])
def test_a_config_that_is_none_is_refused(folder: Path, config: str | None) -> None:
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(InvalidInput, match=r"config\.json"):
        read(folder, "default", [KNOWN])


def test_a_config_stays_what_it_was_to_the_byte(folder: Path) -> None:
    text = json.dumps({"b": 1, "a": 2}, indent=7)
    (folder / "config.json").write_text(text)
    assert read(folder, "default", [KNOWN]).config_json == text
