"""The parts of weights that ranks hold, on stand-ins for vLLM's layers, with the numbers that those have."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from updraft_tap.weights import RefusedError
from updraft_vllm.parts import held_rows, part_of

HEADS, KV_HEADS, HEAD, WIDTH, INNER, VOCAB = 8, 2, 4, 12, 16, 21


def layers(rank: int, size: int) -> dict[str, Any]:
    """The layers of one of `size` ranks, by the name of the weight."""
    common: dict[str, Any] = {"tp_rank": rank, "tp_size": size}
    kv_heads, replicas = max(1, KV_HEADS // size), max(1, size // KV_HEADS)
    qkv = [HEADS // size * HEAD, kv_heads * HEAD, kv_heads * HEAD]
    padded = 24 // size
    tokens = SimpleNamespace(
        org_vocab_start_index=min(rank * padded, VOCAB), org_vocab_end_index=min((rank + 1) * padded, VOCAB)
    )
    return {
        "qkv": SimpleNamespace(
            **common,
            input_size_per_partition=WIDTH,
            output_partition_sizes=qkv,
            num_kv_head_replicas=replicas,
        ),
        "gate_up": SimpleNamespace(
            **common, input_size_per_partition=WIDTH, output_partition_sizes=[INNER // size, INNER // size]
        ),
        "down": SimpleNamespace(**common, input_size_per_partition=INNER // size, output_partition_sizes=[WIDTH]),
        "head": SimpleNamespace(**common, input_size_per_partition=WIDTH, shard_indices=tokens),
        "fc": SimpleNamespace(**common, output_partition_sizes=[WIDTH]),
        "norm": SimpleNamespace(),
    }


def whole() -> dict[str, Tensor]:
    shapes = {
        "qkv": ((HEADS + 2 * KV_HEADS) * HEAD, WIDTH),
        "gate_up": (2 * INNER, WIDTH),
        "down": (WIDTH, INNER),
        "head": (VOCAB, WIDTH),
        "fc": (WIDTH, 3 * WIDTH),
        "norm": (WIDTH,),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def parts(size: int, weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [
        {name: part_of(name, layer, weights[name]) for name, layer in layers(rank, size).items()}
        for rank in range(size)
    ]


def test_one_rank_holds_the_weights_themselves() -> None:
    weights = whole()
    (part,) = parts(1, weights)

    assert all(part[name] is value for name, value in weights.items())
    assert held_rows(layers(0, 1)["head"], VOCAB) == VOCAB


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_all_ranks_compute_what_the_whole_computes(size: int) -> None:
    weights, x, inner = whole(), torch.randn(5, WIDTH), torch.randn(5, INNER)
    ranks = parts(size, weights)

    def outputs(name: str, value: Tensor) -> Tensor:
        return torch.cat([value @ part[name].t() for part in ranks], -1)

    assert torch.allclose(outputs("head", x), x @ weights["head"].t(), atol=1e-5)
    down = sum(part @ one["down"].t() for part, one in zip(inner.chunk(size, -1), ranks, strict=True))
    assert torch.allclose(torch.as_tensor(down), inner @ weights["down"].t(), atol=1e-5)
    gate, up = (x @ weights["gate_up"].t()).chunk(2, -1)
    halves = [(x @ part["gate_up"].t()).chunk(2, -1) for part in ranks]
    assert torch.allclose(torch.cat([half[0] for half in halves], -1), gate, atol=1e-5)
    assert torch.allclose(torch.cat([half[1] for half in halves], -1), up, atol=1e-5)
    assert all(part[name] is weights[name] for part in ranks for name in ("fc", "norm"))
    assert sum(held_rows(layers(rank, size)["head"], VOCAB) for rank in range(size)) == VOCAB


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_has_its_own_heads_and_the_keys_and_values_that_these_read(size: int) -> None:
    weights = whole()
    q, k, v = torch.split(weights["qkv"], [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD])
    for rank, part in enumerate(parts(size, weights)):
        heads = range(rank * HEADS // size, (rank + 1) * HEADS // size)
        read = sorted({head // (HEADS // KV_HEADS) for head in heads})
        expected = [
            *(q[head * HEAD : (head + 1) * HEAD] for head in heads),
            *(each[head * HEAD : (head + 1) * HEAD] for each in (k, v) for head in read),
        ]
        assert torch.equal(part["qkv"], torch.cat(expected))


def test_a_weight_that_cannot_be_cut_like_the_layer_is_refused() -> None:
    layer = layers(1, 2)["qkv"]
    with pytest.raises(RefusedError, match="the part of qkv has shape"):
        part_of("qkv", layer, torch.randn(HEAD, WIDTH))
