"""Swaps of a draft that has the names and shapes that SGLang gives its parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.sglang_draft import Served
from tests.support.tiny_draft import TOKEN_IDS, write_tiny_draft
from torch import Tensor, nn

from updraft_sglang.draft import SglangDraft
from updraft_tap import weights
from updraft_tap.weights import RefusedError

PADDED = 16
"""Rows of the head, as SGLang pads a vocabulary of 10."""


@pytest.fixture
def model() -> Served:
    served = Served()
    served.lm_head.weight = nn.Parameter(torch.zeros(PADDED, 8))  # type: ignore[union-attr]  # as SGLang pads it
    del served.hot_token_id
    served.register_buffer("hot_token_id", torch.arange(10), persistent=False)
    return served


def held(draft: SglangDraft) -> dict[str, Tensor]:
    return {name: torch.cat([piece() for piece in pieces], -1) for name, pieces in draft.readers().items()}


def prepared(draft: SglangDraft, folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    tensors = weights.read(folder, draft.config, draft.aux_size)
    return weights.joined(tensors, draft.dtype), tensors["d2t"]


def test_a_draft_is_written_in_place_and_read_back_as_the_proof_expects(model: Served, tmp_path: Path) -> None:
    draft = SglangDraft(model, Served())
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    embedding = model.model.embed_tokens.weight.clone()  # type: ignore[union-attr, operator]
    new, d2t = prepared(draft, write_tiny_draft(tmp_path / "draft"))

    for write in draft.prepare(new, d2t):
        write()

    assert weights.digest(held(draft)) == weights.digest({**new, "d2t": d2t})
    assert torch.equal(model.hot_token_id, TOKEN_IDS)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    assert torch.equal(model.model.embed_tokens.weight, embedding)  # type: ignore[union-attr, arg-type]
    assert not model.lm_head.weight[10:].any()  # type: ignore[union-attr, index]


def test_the_embedding_and_weights_of_the_target_are_watched(model: Served) -> None:
    target = Served()

    watched = SglangDraft(model, target).target()

    assert watched["shared model.embed_tokens.weight"] is model.model.embed_tokens.weight  # type: ignore[union-attr]
    assert watched["lm_head.weight"] is target.lm_head.weight  # type: ignore[union-attr]


def test_what_was_kept_is_put_back(model: Served, tmp_path: Path) -> None:
    draft = SglangDraft(model, Served())
    before, kept = held(draft), draft.kept()
    for write in draft.prepare(*prepared(draft, write_tiny_draft(tmp_path / "draft"))):
        write()

    for write in kept:
        write()

    assert weights.digest(held(draft)) == weights.digest(before)


@pytest.mark.parametrize("fault", ["name", "shape"])
def test_a_checkpoint_that_does_not_fit_the_parameters_is_refused(model: Served, tmp_path: Path, fault: str) -> None:
    draft = SglangDraft(model, Served())
    new, d2t = prepared(draft, write_tiny_draft(tmp_path / "draft"))
    if fault == "name":
        new["bias"] = new.pop("norm.weight")
    else:
        new["fc.weight"] = new["fc.weight"][:, 1:]

    with pytest.raises(RefusedError, match="bias" if fault == "name" else "fc.weight has shape"):
        draft.prepare(new, d2t)


def _no_map(model: Any) -> None:
    del model.hot_token_id


def _shared_head(model: Any) -> None:
    model.load_lm_head_from_target = True


def _packed(model: Any) -> None:
    model.model.fc.use_intel_amx_backend = True


@pytest.mark.parametrize(
    ("change", "reason"), [(_no_map, "its own vocabulary"), (_shared_head, "target's head"), (_packed, "packed")]
)
def test_a_server_whose_draft_cannot_be_swapped_says_why(model: Served, change: Any, reason: str) -> None:
    change(model)
    with pytest.raises(RefusedError, match=reason):
        SglangDraft(model, Served())
