"""The draft as it serves: the network's own forward, on flat rows of sequences that are behind by different lengths."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny_target import VOCAB, make_draft, make_tiny_target
from torch import Tensor
from torch.testing import assert_close

from updraft_draft.layers import grouped_attention
from updraft_draft.network import DraftNetwork
from updraft_inference.engine import GenerationRequest
from updraft_inference.torch_engine.drafting.eagle import (
    MAX_PENDING_ROWS,
    MAX_ROWS_TOGETHER,
    EagleProposer,
    NotFiniteError,
)
from updraft_inference.torch_engine.model.draft import PackedDraft, pack
from updraft_inference.torch_engine.model.kv_cache import CacheShape, SlotCache
from updraft_inference.torch_engine.proposal import Proposal
from updraft_inference.torch_engine.sequence import Sequence
from updraft_kernels.loader import Kernels


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def network(request: pytest.FixtureRequest, tmp_path: Path) -> DraftNetwork:
    network = make_draft(make_tiny_target(tmp_path)).to(request.param)
    network.share(network.embedding.to(request.param))
    return network


@torch.inference_mode()
def test_the_served_forward_is_the_networks_and_follows_its_weights_when_told(
    network: DraftNetwork, library: Kernels | None
) -> None:
    served, generator = PackedDraft(network, library), torch.Generator().manual_seed(3)
    c, dtype = network.config, network.embedding.dtype
    shape = CacheShape(num_layers=1, num_slots=3, num_positions=9, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim)
    cache = SlotCache(shape, like=network.embedding)
    aux = torch.randn(5, c.aux_size, generator=generator).to(dtype)
    ids = torch.arange(5) + 7
    for _ in range(2):
        x = network.fuse(aux)
        if dtype == torch.bfloat16 and library is not None and library.has_int8:
            assert_near(served.fuse(aux), x)  # weights and inputs are rounded to 8 bits
        else:
            assert_close(served.fuse(aux), x)
        y = served.forward(x, ids, [cache.batch([0, 2], [0, 0], [3, 2])], cache)
        assert_near(y, torch.cat([by_network(network, x[:3], ids[:3]), by_network(network, x[3:], ids[3:])]))
        assert_near(served.head(y)[0].to(y.dtype), network.logits(y))
        assert served.is_current()
        for parameter in network.parameters():
            parameter.mul_(1.5)
        assert not served.is_current()
        served.exchange(pack(network.state_dict(), like=network.lm_head.weight, library=library))


def by_network(network: DraftNetwork, x: Tensor, ids: Tensor) -> Tensor:
    """The states of one sequence from its first position on."""
    num = len(ids)
    rows = network.rows(x[None], ids[None], torch.arange(num)[None])
    mask = torch.full((1, num, num), float("-inf"), dtype=x.dtype).triu(1)
    return network.finish(x, grouped_attention(rows.q, rows.k, rows.v, mask)[0])


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """bfloat16 rounds at other places where operations are joined."""
    if actual.dtype == torch.float32:
        assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    else:
        assert (actual - expected).float().norm() < 0.02 * expected.float().norm()


class Counting(PackedDraft):
    num_forwards = 0

    def forward(self, *args: Any) -> Tensor:
        self.num_forwards += 1
        return super().forward(*args)


@pytest.mark.parametrize("behind", [(1, 1, 1), (1, 4, 2), (MAX_ROWS_TOGETHER + 3, 1, MAX_ROWS_TOGETHER)])
def test_sequences_that_are_behind_by_different_lengths_draft_together_as_alone(
    tmp_path: Path, behind: tuple[int, ...]
) -> None:
    network = make_draft(make_tiny_target(tmp_path))

    def drafted(slots: list[int]) -> list[Proposal]:
        num, k = MAX_ROWS_TOGETHER + 12, 3
        eagle = EagleProposer(network, num_slots=len(behind), num_positions=num + 4)  # the last slot is used to its end
        sequences = [_sequence(network, slot, num=num + slot) for slot in slots]
        for sequence in sequences:
            num = len(sequence.ids) - 1 - behind[sequence.slot]
            eagle.observe(sequence, sequence.pending_aux.pop()[:num])
        eagle.propose(sequences, k)
        for sequence in sequences:
            eagle.observe(sequence, _aux(network, sequence)[-behind[sequence.slot] :])
        eagle._served = counting = Counting(network)
        proposals = eagle.propose(sequences, k)
        assert counting.num_forwards == k, "one to read all that is pending, and one for each draft after the first"
        return proposals

    alone = [drafted([slot])[0] for slot in range(len(behind))]
    for slots in ([0, 1, 2], [0, 2]):
        for slot, mine in zip(slots, drafted(slots), strict=True):
            assert mine.ids == alone[slot].ids
            assert mine.log_probs == pytest.approx(alone[slot].log_probs, abs=1e-5)


@pytest.mark.parametrize(
    "behind", [(1, MAX_PENDING_ROWS, 3), (2, MAX_PENDING_ROWS + 1, 1), (1, MAX_ROWS_TOGETHER + 6, 24)]
)
def test_what_piles_up_is_read_for_all_together_and_drafts_stay_the_same(
    tmp_path: Path, library: Kernels | None, behind: tuple[int, ...]
) -> None:
    network = make_draft(make_tiny_target(tmp_path))
    order = [2, 0, 1]  # in which requests came

    def drafted(*, keeps_up: bool) -> list[Proposal]:
        num_computed_tokens, num_drafts = MAX_ROWS_TOGETHER + 16, 3
        eagle = EagleProposer(network, num_slots=4, num_positions=num_computed_tokens + num_drafts, library=library)
        sequences = {slot: _sequence(network, slot, num=num_computed_tokens) for slot in order}
        for slot, sequence in sequences.items():
            num = len(sequence.ids) - 1 - behind[slot]
            eagle.observe(sequence, sequence.pending_aux.pop()[:num])
        eagle.propose([sequences[slot] for slot in sorted(order)], 1)
        for slot, sequence in sequences.items():
            eagle.observe(sequence, _aux(network, sequence)[-behind[slot] :])
        if keeps_up:
            eagle.keep_up([each for each in sequences.values() if each.num_pending > 1])
            is_due = max(behind) > MAX_PENDING_ROWS
            assert [sequences[slot].num_pending for slot in range(3)] == ([1] * 3 if is_due else list(behind))
        return eagle.propose([sequences[slot] for slot in sorted(order)], num_drafts)

    for kept_up, at_once in zip(drafted(keeps_up=True), drafted(keeps_up=False), strict=True):
        assert kept_up.ids == at_once.ids
        assert kept_up.log_probs == pytest.approx(at_once.log_probs, abs=1e-4)


def test_a_sequence_whose_states_are_not_finite_is_told_from_the_others(tmp_path: Path) -> None:
    network = make_draft(make_tiny_target(tmp_path))
    num = MAX_PENDING_ROWS + 10
    eagle = EagleProposer(network, num_slots=3, num_positions=num)
    sequences = [_sequence(network, slot, num=num) for slot in range(3)]
    sequences[1].pending_aux[0][7] = math.nan
    with pytest.raises(NotFiniteError, match="not finite") as caught:
        eagle.keep_up(sequences)
    assert caught.value.sequences == [sequences[1]]


def _aux(network: DraftNetwork, sequence: Sequence) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sequence.slot)
    return torch.randn(len(sequence.ids) - 1, network.config.aux_size, generator=generator)


def _sequence(network: DraftNetwork, slot: int, *, num: int) -> Sequence:
    ids = [(slot * 31 + 7 * n) % VOCAB for n in range(num)]
    request = GenerationRequest(request_id=str(slot), prompt_ids=tuple(ids[:-1]), max_tokens=20)
    sequence = Sequence(request=request, emit=lambda _: None, slot=slot, ids=ids)
    sequence.pending_aux.append(_aux(network, sequence))
    return sequence
