"""What is prepared for a server: the plugin's folder and the first draft."""

import importlib.metadata
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_target import VOCAB, make_draft, make_tiny_target, save_draft

import updraft_sglang
import updraft_tap
from updraft_artifacts.draft_shape import ShapeChoice
from updraft_chassis.errors import Conflict, InvalidInput
from updraft_draft import checkpoint, vocabulary
from updraft_draft.target_weights import read_head
from updraft_inference.tap import initial_draft, plugin_folder
from updraft_tap.drafting.switch import UNTRAINED
from updraft_trainer.initial_state import TrainerSpec
from updraft_trainer.learning.learner import Hyperparameters


def test_the_folder_is_what_pip_would_have_installed(tmp_path: Path) -> None:
    folder = plugin_folder.write(tmp_path / "deep" / "plugin")

    (distribution,) = importlib.metadata.distributions(path=[str(folder)])
    assert (distribution.name, distribution.version) == ("updraft_sglang", updraft_tap.__version__)
    (point,) = distribution.entry_points
    assert (point.group, point.name, point.value) == ("sglang.srt.plugins", "updraft", "updraft_sglang.plugin:register")
    for package in (updraft_sglang, updraft_tap):
        ours = Path(str(package.__file__)).parent
        written = folder / package.__name__
        files = {path.relative_to(written) for path in written.rglob("*") if path.is_file()}
        assert files == {path.relative_to(ours) for path in ours.rglob("*.py")}


def test_a_folder_that_is_right_is_left_alone_and_another_one_is_put_right(tmp_path: Path) -> None:
    folder = plugin_folder.write(tmp_path / "plugin")
    before = (folder / "updraft_tap" / "wire.py").stat().st_ino
    (folder / "updraft_sglang" / "__pycache__").mkdir()

    plugin_folder.write(folder)
    assert (folder / "updraft_tap" / "wire.py").stat().st_ino == before

    (folder / "updraft_tap" / "wire.py").write_text("of an older release")
    (folder / "updraft_sglang-0.0.1.dist-info").mkdir()
    (folder / "updraft_sglang-0.0.1.dist-info" / "METADATA").write_text("")
    (folder / "somebody's").mkdir()
    plugin_folder.write(folder)

    assert (folder / "updraft_tap" / "wire.py").read_text() != "of an older release"
    assert len(list(folder.glob("updraft_sglang-*"))) == 1
    assert (folder / "somebody's").is_dir()
    assert not list(folder.glob(".part-*"))


def test_what_a_killed_process_left_behind_is_removed(target: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "plugin", tmp_path / "draft"]
    for folder in folders:
        (folder / ".part-killed").mkdir(parents=True)
        (folder / ".part-running").mkdir()
        os.utime(folder / ".part-killed", (0, 0))

    plugin_folder.write(folders[0])
    initial_draft.write(target, folders[1], ShapeChoice(draft_vocab_size=64))

    assert [[part.name for part in folder.glob(".part-*")] for folder in folders] == [[".part-running"]] * 2


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(InvalidInput, match="cannot write"):
        plugin_folder.write(tmp_path / "file" / "plugin")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target")


def test_the_first_draft_is_the_one_that_a_trainer_begins_with(target: Path, tmp_path: Path) -> None:
    initial_draft.write(target, tmp_path / "seed", ShapeChoice(draft_vocab_size=64))
    config, tensors = checkpoint.load(tmp_path / "seed")
    head = read_head(target)
    ids = vocabulary.choose(torch.zeros(VOCAB), always=head.config.eos_token_ids, size=64)
    design = TrainerSpec(
        target=head,
        target_fingerprint="",
        hyper=Hyperparameters(),
        shape=ShapeChoice(draft_vocab_size=64),
        first_samples=0,
        seed=0,
    )
    network = design.learner(ids).network

    assert config == network.config
    for name, tensor in checkpoint.checkpoint_tensors(network):
        assert torch.equal(tensors[name], tensor), name
    assert json.loads((tmp_path / "seed" / "config.json").read_text())[UNTRAINED] is True, (
        "so that no server drafts with it"
    )


def test_the_first_draft_is_written_once(target: Path, tmp_path: Path) -> None:
    folder = initial_draft.write(target, tmp_path / "seed", ShapeChoice(draft_vocab_size=64))
    before = (folder / "model.safetensors").stat().st_ino

    initial_draft.write(target, folder, ShapeChoice(draft_vocab_size=64))

    assert (folder / "model.safetensors").stat().st_ino == before
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_first_draft_of_an_older_release_is_marked_unless_somebody_has_trained_it(
    target: Path, tmp_path: Path, *, is_trained: bool
) -> None:
    folder = initial_draft.write(target, tmp_path / "seed", ShapeChoice(draft_vocab_size=64))
    config = json.loads((folder / "config.json").read_text())
    del config[UNTRAINED]
    (folder / "config.json").write_text(json.dumps({**config, "mine": 1}))
    if is_trained:
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "fc.weight": tensors["fc.weight"] * 2}, folder / "model.safetensors")

    initial_draft.write(target, folder, ShapeChoice(draft_vocab_size=64))

    now = json.loads((folder / "config.json").read_text())
    assert now == {**config, "mine": 1, **({} if is_trained else {UNTRAINED: True})}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_first_draft_that_was_cut_off_is_written_anew(target: Path, tmp_path: Path) -> None:
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "model.safetensors").write_text("half")

    initial_draft.write(target, tmp_path / "seed", ShapeChoice(draft_vocab_size=64))

    checkpoint.load(tmp_path / "seed")


def test_a_draft_of_another_shape_is_not_overwritten(target: Path, tmp_path: Path) -> None:
    initial_draft.write(target, tmp_path / "seed", ShapeChoice(draft_vocab_size=64))

    with pytest.raises(Conflict, match="a draft of another shape"):
        initial_draft.write(target, tmp_path / "seed", ShapeChoice(draft_vocab_size=65))
    (tmp_path / "seed" / "config.json").write_text("{}")
    with pytest.raises(Conflict, match="does not contain a draft"):
        initial_draft.write(target, tmp_path / "seed", ShapeChoice(draft_vocab_size=64))


def test_a_server_can_start_with_the_sizes_of_a_published_draft(target: Path, tmp_path: Path) -> None:
    published = replace(read_head(target).draft(draft_vocab_size=100), intermediate_size=40, max_position=4096)
    folder = initial_draft.write(target, tmp_path / "seed", ShapeChoice(), published.to_json())
    config, tensors = checkpoint.load(folder)
    assert config == published
    assert len(tensors["d2t"]) == 100


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 600}, "the draft's vocabulary is 600"),
        ({"aux_layers": (1, 2, 3)}, r"the draft reads layers \[1, 2, 3\]"),
        ({"norm_before_residual": True}, "it has norm_before_residual"),
    ],
)
def test_a_published_draft_that_no_server_of_the_target_can_serve_is_refused(
    target: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    published = replace(read_head(target).draft(draft_vocab_size=100), **changes)
    with pytest.raises(InvalidInput, match=reason):
        initial_draft.write(target, tmp_path / "seed", ShapeChoice(), published.to_json())
    with pytest.raises(InvalidInput, match="is not JSON"):
        initial_draft.write(target, tmp_path / "seed", ShapeChoice(), "{")


def test_a_trained_draft_of_the_same_shape_may_stand_for_the_first(target: Path, tmp_path: Path) -> None:
    digest = save_draft(make_draft(target, seed=9), tmp_path / "seed")

    initial_draft.write(target, tmp_path / "seed", ShapeChoice(draft_vocab_size=256))

    _, tensors = checkpoint.load(tmp_path / "seed")
    assert digest
    assert not torch.equal(tensors["fc.weight"], make_draft(target, seed=0).fc.weight.bfloat16())
