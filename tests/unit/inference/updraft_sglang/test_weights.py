import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.sglang_draft import Served
from tests.support.tiny_draft import TOKEN_IDS, write_tiny_draft
from torch import Tensor, nn

from updraft_sglang import weights
from updraft_sglang.weights import LOADER, checked, load, served
from updraft_tap.weights import RefusedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_draft(tmp_path / "v7")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("version", "digest", "is_answered"):
        monkeypatch.setattr(served, name, getattr(weights.ServedVersion(), name))


def payload(folder: Path, version: int = 7, digest: str = "sha256:7") -> list[tuple[str, Tensor]]:
    return [
        ("folder", torch.tensor(list(str(folder).encode()), dtype=torch.uint8)),
        ("version", torch.tensor([version])),
        ("digest", torch.tensor(list(digest.encode()), dtype=torch.uint8)),
    ]


def update(model: Served, named: list[tuple[str, Tensor]], load_format: str = LOADER) -> Any:
    """As SGLang's updater calls a loader, with the hook around it."""

    def original(_: Any, named_tensors: Any, load_format: str) -> Any:
        assert load_format
        load(model, named_tensors)
        return True, "Success"

    return weights.answered(original, "updater", named_tensors=named, load_format=load_format)


def test_a_draft_is_loaded_and_its_version_remembered(folder: Path) -> None:
    model = Served()

    assert update(model, payload(folder)) == (True, "Success")

    stored = load_file(folder / "model.safetensors")
    assert model.loaded.keys() == stored.keys() - {"d2t", "t2d"}
    assert torch.equal(model.hot_token_id, TOKEN_IDS)
    assert all(torch.equal(model.loaded[name], stored[name]) for name in model.loaded)
    assert (served.version, served.digest) == (7, "sha256:7")


def test_the_seed_is_loaded_again_as_version_0_without_a_digest(folder: Path) -> None:
    model = Served()
    update(model, payload(folder))

    assert update(model, payload(folder, version=0, digest="")) == (True, "Success")
    assert (served.version, served.digest) == (0, "")


Change = Callable[[dict[str, Tensor]], Any]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("fc.weight"), r"lacks \['fc.weight'\]"),
        (lambda t: t.update({"embed_tokens.weight": torch.zeros(24, 8)}), r"unknown \['embed_tokens.weight'\]"),
        (lambda t: t.update({"fc.weight": torch.zeros(8, 16)}), r"fc.weight has shape \(8, 16\)"),
        (lambda t: t["norm.weight"].fill_(float("nan")), "norm.weight has values that are not finite"),
        (lambda t: t["lm_head.weight"][3].fill_(-torch.inf), "lm_head.weight has values that are not finite"),
        (lambda t: t["d2t"].add_(1), "another vocabulary"),
        (lambda t: t["d2t"].add_(6), "tokens that the target does not have"),
    ],
)
def test_an_unsound_draft_is_refused_before_anything_is_written(folder: Path, change: Change, reason: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    model = Served()

    with pytest.raises(RefusedError, match=reason):
        checked(model, folder)
    success, message = update(model, payload(folder))

    assert (success, model.loaded, served.version) == (False, {}, 0)
    assert re.search(reason, message)


def shared(model: Served) -> Tensor:
    """The map that the worker drafts with, which on a GPU is a copy of the model's."""
    worker = SimpleNamespace(draft_worker=SimpleNamespace(draft_runner=SimpleNamespace(model=model)))
    worker.draft_worker.hot_token_id = model.hot_token_id.clone()
    weights.share_vocabulary(worker)
    token_ids: Tensor = worker.draft_worker.hot_token_id
    return token_ids


def test_another_vocabulary_is_written_where_the_worker_reads_it(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["d2t"].add_(1)
    save_file(tensors, folder / "model.safetensors")
    model = Served()
    drafted_with = shared(model)

    assert update(model, payload(folder)) == (True, "Success")

    assert torch.equal(drafted_with, TOKEN_IDS + 1)
    assert dict(model.named_buffers())["hot_token_id"] is drafted_with


def test_a_draft_that_proposes_every_token_has_no_map_to_share() -> None:
    model = Served()
    model.hot_token_id = None  # type: ignore[assignment]  # as SGLang has it without d2t
    weights.share_vocabulary(
        SimpleNamespace(draft_worker=SimpleNamespace(draft_runner=SimpleNamespace(model=model), hot_token_id=None))
    )

    assert not dict(model.named_buffers())


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 16), ("rms_norm_eps", 1e-6), ("updraft", {"aux_layers": [1]})]
)
def test_another_config_is_refused(folder: Path, key: str, value: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    with pytest.raises(RefusedError, match=f"{key} is"):
        checked(Served(), folder)


def test_a_file_that_was_cut_off_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])

    with pytest.raises(RefusedError, match="cannot read"):
        checked(Served(), folder)


def test_a_file_that_is_not_to_be_seen_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    with pytest.raises(RefusedError, match="cannot read"):
        checked(Served(), folder)


@pytest.mark.attack(
    boundary="drafts",
    attack="a draft that is loaded into the target",
    outcome="refused; the target is never written",
)
def test_the_target_is_never_written(folder: Path) -> None:
    target = Served()
    target.hot_token_id = None  # type: ignore[assignment]  # as a target has none

    with pytest.raises(RefusedError, match="not an EAGLE-3 draft"):
        checked(target, folder)


def test_a_head_that_is_the_targets_is_never_written(folder: Path) -> None:
    model = Served()
    model.load_lm_head_from_target = True

    with pytest.raises(RefusedError, match="shares its head"):
        checked(model, folder)


def test_a_served_draft_of_another_build_is_refused(folder: Path) -> None:
    model = Served()
    model.model.register_parameter("input_norm", nn.Parameter(torch.zeros(24)))

    with pytest.raises(RefusedError, match="has the parameters"):
        checked(model, folder)


def test_another_payload_is_refused(folder: Path) -> None:
    success, message = update(Served(), payload(folder)[:2])

    assert (success, message) == (
        False,
        "the payload has ['folder', 'version'], expected ['digest', 'folder', 'version']",
    )


def test_a_write_that_fails_in_the_middle_says_so_and_forgets_the_digest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Served()
    update(model, payload(folder))

    def failing(_: Iterable[tuple[str, Tensor]]) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "load_weights", failing)
    success, message = update(model, payload(folder, version=8))

    assert (success, served.version, served.digest) == (False, 7, "")
    assert "loaded only in part" in message


def test_without_the_hook_a_refusal_does_not_end_the_server(folder: Path) -> None:
    model = Served()

    load(model, payload(folder / "missing"))

    assert (model.loaded, served.version) == ({}, 0)


def test_updates_of_others_are_left_alone(folder: Path) -> None:
    def original(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("Unknown load_format=other")

    with pytest.raises(NotImplementedError):
        weights.answered(original, "updater", named_tensors=payload(folder), load_format="other")
