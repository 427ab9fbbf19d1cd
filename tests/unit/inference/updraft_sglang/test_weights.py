"""Drafts that were prepared, as SGLang's updater loads them, on a stand-in for the model that it serves."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.support.sglang_draft import Served, shared
from tests.support.tiny_draft import TOKEN_IDS, write_tiny_draft
from tests.support.wait import wait_until
from torch import Tensor

from updraft_sglang import configuration, names, weights
from updraft_sglang.ranks import preparation
from updraft_sglang.ranks.preparation import PREPARE, PREPARED, Preparation, Prepared
from updraft_sglang.weights import LOADER, load, served
from updraft_tap.weights import UNKNOWN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_draft(tmp_path / "v7")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a process that has just started, of one rank."""
    for name in ("version", "digest", "is_answered", "is_mixed", "asked"):
        monkeypatch.setattr(served, name, getattr(weights.ServedVersion(), name))
    monkeypatch.setattr(weights, "preparation", Preparation(LOADER, lambda value, _: [value]))
    monkeypatch.setattr(configuration, "place", lambda: (0, 1))
    monkeypatch.setattr(configuration, "is_one_node", lambda: True)
    monkeypatch.setattr(preparation, "resolved", {names.CHECKED: SimpleNamespace}.__getitem__)


def prepare(model: Served, folder: Path, version: int = 7, digest: str = "sha256:7") -> str:
    """The order."""
    runner = SimpleNamespace(model=model, weight_updater=SimpleNamespace(custom_weight_loaders={LOADER: load}))
    worker = SimpleNamespace(
        draft_worker=SimpleNamespace(draft_runner=runner),
        target_worker=SimpleNamespace(model_runner=SimpleNamespace(model=Served())),
    )
    order = json.dumps({"folder": str(folder), "version": version, "digest": digest})
    manager, request = (
        SimpleNamespace(draft_worker=worker, tp_cpu_group=0, offload_tags=()),
        SimpleNamespace(action=PREPARE + order),
    )

    def is_prepared() -> bool:
        answer = weights.preparation.check(lambda *_: None, manager, request)
        assert answer.success, answer.message
        return bool(answer.message == PREPARED)

    wait_until(is_prepared, what="the preparation")
    return order


def payload(order: str = "none") -> list[tuple[str, Tensor]]:
    return [("order", torch.tensor(list(order.encode()), dtype=torch.uint8))]


def update(model: Served, named: list[tuple[str, Tensor]], load_format: str = LOADER) -> Any:
    """As SGLang's updater calls a loader, with the hook around it."""

    def original(_: Any, named_tensors: Any, load_format: str) -> Any:
        assert load_format
        load(model, named_tensors)
        return True, "Success"

    return weights.answered(original, "updater", named_tensors=named, load_format=load_format)


def is_written(model: Served) -> bool:
    return any(bool(parameter.any()) for parameter in model.parameters())


def test_a_draft_that_was_prepared_is_loaded_and_its_version_remembered(folder: Path) -> None:
    model = shared(Served())
    map_of_worker = model.hot_token_id
    map_of_worker.zero_()
    order = prepare(model, folder)

    assert update(model, payload(order)) == (True, "Success")

    stored = load_file(folder / "model.safetensors")
    held = dict(model.named_parameters())
    assert torch.equal(held["model.fc.weight"], stored["fc.weight"])
    assert torch.equal(held["model.layers.0.mlp.gate_up_proj.weight"][:12], stored["midlayer.mlp.gate_proj.weight"])
    assert not held["model.embed_tokens.weight"].any()
    assert torch.equal(map_of_worker, TOKEN_IDS), "written where the worker reads it"
    assert (served.version, served.digest) == (7, "sha256:7")


def test_the_seed_is_loaded_again_as_version_0_without_a_digest(folder: Path) -> None:
    model = shared(Served())
    update(model, payload(prepare(model, folder)))
    order = prepare(model, folder, version=0, digest="")

    assert update(model, payload(order)) == (True, "Success")
    assert (served.version, served.digest) == (0, "")


def test_a_draft_that_proposes_every_token_has_no_map_to_share() -> None:
    model = Served()
    model.hot_token_id = None  # type: ignore[assignment]  # as SGLang has it without d2t

    assert not dict(shared(model).named_buffers())


@pytest.mark.attack(
    boundary="drafts",
    attack="a draft that is loaded into the target",
    outcome="refused; the target is never written",
)
def test_the_target_is_never_written(folder: Path) -> None:
    model, target = shared(Served()), Served()
    order = prepare(model, folder)

    is_done, message = update(target, payload(order))

    assert not is_done
    assert "send selector=draft" in message
    assert not is_written(target)
    assert not is_written(model)


def test_what_was_not_prepared_is_not_loaded(folder: Path) -> None:
    model = shared(Served())
    prepare(model, folder)

    assert update(model, payload()) == (False, "it has not prepared this draft")
    assert update(model, [("version", torch.tensor([7]))]) == (
        False,
        "the payload has ['version'], expected ['order']",
    )
    assert (is_written(model), served.version, served.digest) == (False, 0, "")


@pytest.mark.parametrize("stays", [False, True])
def test_a_write_that_fails_in_the_middle_is_undone_or_else_the_digest_forgotten(folder: Path, *, stays: bool) -> None:
    model = shared(Served())
    update(model, payload(prepare(model, folder)))
    order = prepare(model, folder, version=8)

    def failing() -> None:
        raise RuntimeError("out of memory")

    job = weights.preparation._job
    assert job is not None
    assert isinstance(job.result, Prepared)
    kept = [failing] if stays else job.result.kept
    job.result = replace(job.result, writes=[*job.result.writes[:3], failing], kept=kept)
    is_done, message = update(model, payload(order))

    digest = UNKNOWN if stays else "sha256:7"
    assert (is_done, served.version, served.digest, served.is_mixed) == (False, 7, digest, stays)
    assert "loaded only in part" in message
    assert update(model, payload(prepare(model, folder))) == (True, "Success")
    assert not served.is_mixed


def test_a_refusal_of_sglang_itself_is_told(folder: Path) -> None:
    model = shared(Served())
    order = prepare(model, folder)

    answer = weights.answered(lambda *_, **__: (False, "no online updates"), "updater", payload(order), LOADER)

    assert answer == (False, "no online updates")
    assert (is_written(model), served.version, served.digest) == (False, 0, "")


def test_another_release_of_sglang_is_told_as_a_refusal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared(Served())
    order = prepare(model, folder)
    monkeypatch.setattr(configuration, "is_one_node", lambda: SimpleNamespace().nnodes)

    is_done, message = update(model, payload(order))

    assert not is_done
    assert "has no attribute 'nnodes'" in message
    assert (is_written(model), served.version, served.is_mixed) == (False, 0, False)


def test_without_the_hook_a_refusal_does_not_end_the_server() -> None:
    model = shared(Served())

    load(model, payload())

    assert (is_written(model), served.version) == (False, 0)


def test_updates_of_others_are_left_alone() -> None:
    def original(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("Unknown load_format=other")

    with pytest.raises(NotImplementedError):
        weights.answered(original, "updater", named_tensors=payload(), load_format="other")
