"""The hashes that a server must show. The real server is asked in tests/sglang."""

from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import DRAFT_VOCAB, HIDDEN, make_draft, make_tiny_target, save_draft
from torch import Tensor

from updraft_draft import checkpoint
from updraft_draft.config import DraftConfig
from updraft_inference.sidecar.sglang import checksums
from updraft_inference.sidecar.sglang.server import RankChecksums

Draft = tuple[DraftConfig, dict[str, Tensor]]

OF_SGLANGS_KERNEL = {
    1: "3d93a6540b54ef2a",
    5: "7b5bfc3d4b4e674e",
    63: "33f43ffa0aa54c5c",
    16384: "3a84069ab550d97e",
    20001: "3434075e64b12382",
    49155: "eb3684400c9d054c",
}
"""By number of bytes: what gpu_tensor_hash of SGLang 0.5.23 says of them in Triton's interpreter (tests/sglang)."""


@pytest.mark.parametrize("size", OF_SGLANGS_KERNEL)
def test_the_hash_of_a_gpu_is_the_kernels(size: int) -> None:
    values = ((torch.arange(size, dtype=torch.int64) * 2654435761) % 251).to(torch.uint8)

    assert f"{checksums.gpu_hash(values):016x}" == OF_SGLANGS_KERNEL[size]


def test_the_hash_of_nothing_is_zero() -> None:
    assert checksums.gpu_hash(torch.empty(0)) == 0


def test_a_large_tensor_is_hashed_by_blocks_as_a_whole() -> None:
    words = torch.arange(3 * 32 * 8192 + 5, dtype=torch.int32)
    whole = checksums.gpu_hash(words)

    assert whole == checksums.gpu_hash(words.clone())
    words[-1] += 1
    assert whole != checksums.gpu_hash(words)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Draft:
    folder: Path = tmp_path_factory.mktemp("draft")
    save_draft(make_draft(make_tiny_target(folder / "target")), folder / "1")
    config, tensors = checkpoint.load(folder / "1")
    return config, tensors


def test_ranks_hold_parts_that_make_up_the_whole(draft: Draft) -> None:
    config, tensors = draft
    (whole,) = ranks(draft, 1)
    first, second = ranks(draft, 2)

    assert first.keys() == second.keys() == whole.keys()
    for name in ("fc", "norm", "layers.0.hidden_norm"):
        assert first[f"model.{name}.weight"].equal(second[f"model.{name}.weight"])
    for name, dim in (("self_attn.o_proj", 1), ("mlp.down_proj", 1)):
        parts = [rank[f"model.layers.0.{name}.weight"] for rank in (first, second)]
        assert torch.cat(parts, dim).equal(tensors[f"midlayer.{name}.weight"])
    heads = [rank["lm_head.weight"] for rank in (first, second)]
    assert torch.cat(heads).equal(whole["lm_head.weight"])
    gate, up = (torch.cat(two) for two in zip(*(halves(rank) for rank in (first, second)), strict=True))
    assert gate.equal(tensors["midlayer.mlp.gate_proj.weight"])
    assert up.equal(tensors["midlayer.mlp.up_proj.weight"])
    size = config.head_dim
    q, k, v = torch.split(first["model.layers.0.self_attn.qkv_proj.weight"], [2 * size, size, size])
    assert q.equal(tensors["midlayer.self_attn.q_proj.weight"][: 2 * size])
    assert k.equal(tensors["midlayer.self_attn.k_proj.weight"][:size])
    assert v.equal(tensors["midlayer.self_attn.v_proj.weight"][:size])


def test_ranks_share_key_value_heads_where_there_are_fewer(draft: Draft) -> None:
    config, tensors = draft
    size = config.head_dim
    of_rank = [rank["model.layers.0.self_attn.qkv_proj.weight"][size : 2 * size] for rank in ranks(draft, 4)]
    heads = torch.split(tensors["midlayer.self_attn.k_proj.weight"], size)

    assert [each.equal(heads[head]) for each, head in zip(of_rank, (0, 0, 1, 1), strict=True)] == [True] * 4


def test_a_head_is_padded_with_zeros(draft: Draft) -> None:
    config, tensors = draft
    short = tensors | {"lm_head.weight": tensors["lm_head.weight"][:-10]}
    head = checksums.served_tensors(config, short, tp=(0, 1))["lm_head.weight"]

    assert head.shape == (DRAFT_VOCAB, HIDDEN)
    assert not head[-10:].any()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_changed_weight_is_named(draft: Draft, device: str) -> None:
    config, tensors = draft
    wanted = checksums.expected_hashes(config, tensors, dtype=torch.float32, device=device, tp=(0, 1))
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["midlayer.mlp.up_proj.weight"][0, 0] += 1
    shown = checksums.expected_hashes(config, changed, dtype=torch.float32, device=device, tp=(0, 1))
    served = RankChecksums(tp_rank=0, tp_size=1, hashes=shown | {"draft.model.embed_tokens.weight": "any"})

    assert checksums.differing(wanted, served) == ["draft.model.layers.0.mlp.gate_up_proj.weight"]
    assert checksums.differing(shown, served) == []


def test_the_map_counts_and_a_server_that_does_not_show_it_differs(draft: Draft) -> None:
    config, tensors = draft
    other = tensors | {"d2t": tensors["d2t"] + 1}
    wanted, shown = (
        checksums.expected_hashes(config, each, dtype=torch.float32, device="cpu", tp=(0, 1))
        for each in (tensors, other)
    )
    served = RankChecksums(tp_rank=0, tp_size=1, hashes=shown)
    hidden = RankChecksums(tp_rank=0, tp_size=1, hashes=dict(list(shown.items())[:-1]))

    assert checksums.differing(wanted, served) == [checksums.VOCABULARY]
    assert checksums.differing(shown, hidden) == [checksums.VOCABULARY]
    assert (checksums.shows_vocabulary([served]), checksums.shows_vocabulary([served, hidden])) == (True, False)


def test_only_auto_leaves_open_what_a_server_serves_in() -> None:
    assert checksums.candidate_dtypes("bfloat16") == (torch.bfloat16,)
    assert set(checksums.candidate_dtypes("auto")) == {torch.bfloat16, torch.float16, torch.float32}


def ranks(draft: Draft, size: int) -> list[dict[str, Tensor]]:
    config, tensors = draft
    return [checksums.served_tensors(config, tensors, tp=(rank, size)) for rank in range(size)]


def halves(rank: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    both = rank["model.layers.0.mlp.gate_up_proj.weight"]
    first, second = both.chunk(2)
    return first, second
