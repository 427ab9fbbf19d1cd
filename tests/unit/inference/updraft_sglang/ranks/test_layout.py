"""The parts of a draft, compared with what the agent expects each rank of SGLang to hold."""

from dataclasses import replace

import pytest
import torch
from tests.support.tiny_draft import CONFIG, TOKEN_IDS

from updraft_draft.network import initial_network
from updraft_inference.sidecar.sglang.checksums import served_tensors
from updraft_sglang.ranks import layout
from updraft_tap.weights import joined

WIDE = replace(CONFIG, num_heads=8, num_kv_heads=2, hidden_size=32, target_hidden_size=32, intermediate_size=48)


def tensors() -> dict[str, torch.Tensor]:
    size, draw = WIDE.target_hidden_size, torch.Generator().manual_seed(0)
    embedding = torch.randn(WIDE.vocab_size, size, generator=draw)
    network = initial_network(WIDE, embedding, embedding[TOKEN_IDS], torch.ones(size), TOKEN_IDS)
    return {name: torch.randn(value.shape, generator=draw) for name, value in network.state_dict().items()}


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (0, 4), (1, 4), (2, 4), (3, 4)])
def test_a_rank_gets_what_it_holds_of_heads_that_it_may_share_with_others(rank: int, size: int) -> None:
    whole = tensors()
    held = served_tensors(WIDE, whole, tp=(rank, size))
    head_rows = len(held["lm_head.weight"])

    parts = layout.part(whole, num_kv_heads=WIDE.num_kv_heads, head_rows=head_rows, rank=rank, size=size)

    found = joined(parts, torch.float32)
    assert found.keys() == {name.removeprefix("model.") for name in held}
    for name, value in held.items():
        mine = found[name.removeprefix("model.")]
        if name == "lm_head.weight":  # which is padded when it is written
            assert torch.equal(mine, value[: len(mine)])
            assert not value[len(mine) :].any()
        else:
            assert torch.equal(mine, value), name
