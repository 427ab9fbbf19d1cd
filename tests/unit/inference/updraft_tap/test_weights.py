"""Digests of what an engine serves, samples of its target, and the order of joined weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tests.support.tiny_draft import write_tiny_draft
from torch import nn

from updraft_tap import weights


def test_the_digest_covers_names_types_shapes_and_values_and_forgives_the_sign_of_zero() -> None:
    one = {"a": torch.tensor([1.0, 0.0, 1e-40]), "d2t": torch.tensor([3])}
    others = [
        {"b": one["a"], "d2t": one["d2t"]},
        {**one, "a": one["a"].double()},
        {**one, "a": one["a"][None]},
        {**one, "a": torch.tensor([1.0, 0.0, 1e-30])},
        {**one, "d2t": torch.tensor([4])},
    ]

    assert weights.digest(one) == weights.digest({**one, "a": torch.tensor([1.0, -0.0, 0.0])})
    assert len({weights.digest(other) for other in [one, *others]}) == len(others) + 1


def test_joined_weights_are_in_the_engines_order(tmp_path: Path) -> None:
    tensors = load_file(write_tiny_draft(tmp_path) / "model.safetensors")

    joined = weights.joined(tensors, torch.float32)

    q, k, v = (tensors[f"midlayer.self_attn.{part}_proj.weight"].float() for part in "qkv")
    gate, up = (tensors[f"midlayer.mlp.{part}_proj.weight"].float() for part in ("gate", "up"))
    assert torch.equal(joined["layers.0.self_attn.qkv_proj.weight"], torch.cat([q, k, v]))
    assert torch.equal(joined["layers.0.mlp.gate_up_proj.weight"], torch.cat([gate, up]))


def test_samples_of_large_tensors_are_few_and_differ_if_a_tensor_is_replaced() -> None:
    large = {
        "a": torch.randn(1000, 700, dtype=torch.bfloat16),
        "b": torch.randn(50, 40, 30),
        "c": torch.tensor(1.0),
        "empty": torch.empty(0),
    }
    others = [
        {**large, "a": torch.randn(1000, 700, dtype=torch.bfloat16)},
        {**large, "a": large["a"].float()},
        {**large, "b": large["b"] + 1},
        {**large, "c": torch.tensor(2.0)},
    ]
    transposed = {**large, "a": large["a"].t().contiguous().t()}

    assert weights.sampled(large) == weights.sampled(transposed)
    assert len({weights.sampled(one) for one in [large, *others]}) == len(others) + 1


def test_the_watched_weights_are_what_the_draft_shares_and_some_of_the_target_but_no_experts() -> None:
    target, draft = nn.Module(), nn.Module()
    target.embed_tokens, target.lm_head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
    target.experts = nn.Linear(4, 4)
    target.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(500))
    target.norm = nn.LayerNorm(4, bias=False)
    draft.embed_tokens, draft.fc = target.embed_tokens, nn.Linear(4, 4)

    watched = weights.watched(target, draft)

    assert watched["shared embed_tokens.weight"] is target.embed_tokens.weight
    assert "norm.weight" in watched
    assert not [name for name in watched if "experts" in name or "fc" in name]
    assert 50 < len(watched) < 150


class Packed(torch.Tensor):
    """Is made of other tensors, for torch."""

    def __tensor_flatten__(self) -> None: ...


def test_weights_that_are_made_of_other_tensors_are_not_watched() -> None:
    target, draft = nn.Module(), nn.Module()
    target.norm, target.packed, target.sparse = nn.LayerNorm(4, bias=False), nn.Module(), nn.Module()
    target.packed.weight = nn.Parameter(torch.ones(4).as_subclass(Packed))
    target.sparse.weight = nn.Parameter(torch.eye(4).to_sparse())

    assert list(weights.watched(target, draft)) == ["norm.weight"]
