"""The draft unrolled for training is the draft that serves, row for row."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import DRAFT_VOCAB, HIDDEN, make_draft, make_tiny_target
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from updraft_artifacts.rope import Rope
from updraft_draft import network
from updraft_draft.layers import grouped_attention, rotary_table
from updraft_draft.layout import Layout, Span
from updraft_draft.network import DraftNetwork


@pytest.fixture
def draft(tmp_path: Path) -> DraftNetwork:
    return make_draft(make_tiny_target(tmp_path / "target"))


def _serve(draft: DraftNetwork, aux: Tensor, ids: Tensor, row: int, num_steps: int) -> list[Tensor]:
    """What serving computes at `row`: read rows 0..row from the target, then go on from the draft's own states."""
    positions = torch.arange(row + 1)[None]
    x = draft.fuse(aux[:, : row + 1])
    rows = draft.rows(x, ids[:, : row + 1], positions)
    keys, values = rows.k, rows.v
    mask = torch.full((row + 1, row + 1), float("-inf")).triu(1)[None]
    state = draft.finish(x, grouped_attention(rows.q, keys, values, mask))[:, -1:]
    states = [state]
    for j in range(1, num_steps):
        rows = draft.rows(state, ids[:, row + j : row + j + 1], torch.tensor([[row + j]]))
        keys, values = torch.cat([keys, rows.k], 1), torch.cat([values, rows.v], 1)
        state = draft.finish(state, grouped_attention(rows.q, keys, values, None))
        states.append(state)
    return [s[0, 0] for s in states]


@pytest.mark.parametrize("first_row", [0, 3])
def test_unrolling_all_rows_equals_serving_each_row(draft: DraftNetwork, first_row: int) -> None:
    generator = torch.Generator().manual_seed(5)
    num_rows, num_steps = 9, 4
    aux = torch.randn(1, num_rows, 3 * HIDDEN, generator=generator)
    ids = torch.randint(0, 500, (1, num_rows + num_steps - 1), generator=generator)
    states = draft.unroll(aux, ids, num_steps=num_steps, first_row=first_row)
    for row in range(first_row, num_rows):
        for j, state in enumerate(_serve(draft, aux, ids, row, num_steps)):
            torch.testing.assert_close(states[j][0, row - first_row], state, rtol=1e-4, atol=1e-5)


def test_packed_texts_and_a_branch_have_the_states_of_each_text_alone(draft: DraftNetwork) -> None:
    generator = torch.Generator().manual_seed(6)
    num_rows, num_steps, place = 9, 3, 6
    aux, other = (torch.randn(1, num_rows, 3 * HIDDEN, generator=generator) for _ in range(2))
    ids, other_ids = (torch.randint(0, 500, (1, num_rows + num_steps - 1), generator=generator) for _ in range(2))
    first = place - num_steps + 1  # the first row whose last step reads a token of the branch
    branch, branch_ids = other.clone(), other_ids.clone()
    branch[:, :place], branch_ids[:, :place] = aux[:, :place], ids[:, :place]
    texts = Layout.of_texts(torch.cat([ids, other_ids]), num_steps=num_steps, first_row=2)
    windows = branch_ids.unfold(1, num_steps, 1)[0, first:]
    layout = Layout(
        torch.cat([texts.ids, windows]),
        torch.cat([texts.positions, torch.arange(first, num_rows)]),
        (*texts.spans, Span(2 * num_rows, 2 * num_rows + len(windows), 0, first)),
        texts.limit,
    )
    packed = torch.cat([aux[0], other[0], branch[0, first:]])
    expected = [
        torch.cat([alone[0, 2:], beside[0, 2:], branched[0, first:]])
        for alone, beside, branched in zip(
            *(
                draft.unroll(one, following, num_steps=num_steps)
                for one, following in ((aux, ids), (other, other_ids), (branch, branch_ids))
            ),
            strict=True,
        )
    ]
    for recompute in (False, True):
        states = draft.unroll_packed(packed, layout, recompute=recompute)
        for state, alone in zip(states, expected, strict=True):
            torch.testing.assert_close(state, alone, rtol=1e-4, atol=1e-5)


def test_the_embedding_is_neither_trained_nor_shipped(draft: DraftNetwork) -> None:
    assert not [name for name in draft.state_dict() if "embed" in name]
    assert all(p is not draft.embedding for p in draft.parameters())


def test_an_untrained_draft_has_the_targets_head_for_its_tokens(tmp_path: Path) -> None:
    target = make_tiny_target(tmp_path / "target")
    token_ids = torch.arange(0, 512, 2)
    draft = make_draft(target, token_ids=token_ids)
    assert torch.equal(draft.token_ids, token_ids)
    assert torch.equal(draft.lm_head.weight, draft.embedding[token_ids])
    assert int(draft.t2d.sum()) == DRAFT_VOCAB


def test_a_scaled_embedding_changes_nothing_for_it_is_normed_first(draft: DraftNetwork) -> None:
    """So a draft of Gemma reads the embedding as it is stored, without the factor that Gemma multiplies it with."""
    generator = torch.Generator().manual_seed(7)
    aux, ids = torch.randn(1, 6, 3 * HIDDEN, generator=generator), torch.randint(0, 500, (1, 6), generator=generator)
    before = draft.logits(draft.unroll(aux, ids, num_steps=1)[0])
    draft.share(draft.embedding * HIDDEN**0.5)
    torch.testing.assert_close(draft.logits(draft.unroll(aux, ids, num_steps=1)[0]), before, rtol=1e-3, atol=1e-3)


def test_a_draft_for_a_target_of_ten_million_positions_holds_those_that_texts_have(draft: DraftNetwork) -> None:
    config = replace(draft.config, max_position=10_000_000)
    large = DraftNetwork(config, draft.embedding, draft.token_ids)
    before = large.rotary(torch.tensor([7]))
    far = large.rotary(torch.tensor([3000, 7]))
    assert sum(table.shape[0] for table in large._rotary) == 2 * 4096
    whole = rotary_table(4000, config.head_dim, config.rope)
    for early, late, table in zip(before, far, whole, strict=True):
        assert torch.equal(late[:, 0], table[[3000, 7]])
        assert torch.equal(early[0], late[1])


def test_a_longer_table_of_positions_that_was_made_meanwhile_stays(
    draft: DraftNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = draft.copy()
    other, made = one.copy(), []

    def slow(num_positions: int, head_dim: int, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(num_positions)
        if num_positions == 2048:
            other.rotary(torch.tensor([5000]))  # meanwhile, in another thread
        return rotary_table(num_positions, head_dim, rope)

    monkeypatch.setattr(network, "rotary_table", slow)
    assert one.rotary(torch.tensor([2000]))[0].shape == (1, 1, draft.config.head_dim)
    one.rotary(torch.tensor([5000]))
    assert made == [2048, 8192]


def test_a_table_of_positions_that_became_shorter_costs_only_another_computation(draft: DraftNetwork) -> None:
    one = draft.copy()
    before = one.rotary(torch.tensor([5000]))
    one._rotary[:] = one._new_table(2048)
    for early, late in zip(before, one.rotary(torch.tensor([5000])), strict=True):
        assert torch.equal(early, late)


def test_a_draft_is_unrolled_without_asking_the_device_for_a_value(draft: DraftNetwork) -> None:
    with FakeTensorMode():  # refuses to show a value
        fake = DraftNetwork(draft.config, torch.zeros(draft.embedding.shape), torch.arange(DRAFT_VOCAB))
        states = fake.unroll(torch.zeros(1, 2000, 3 * HIDDEN), torch.zeros(1, 2002, dtype=torch.long), num_steps=3)
    assert [state.shape for state in states] == [(1, 2000, HIDDEN)] * 3
    assert len(fake._rotary[0]) == 2048


def test_a_widened_draft_has_the_same_values_and_leaves_the_original_alone(draft: DraftNetwork) -> None:
    narrow = draft.bfloat16().requires_grad_(requires_grad=False)
    wide = narrow.widened()
    assert wide.embedding is narrow.embedding
    assert {one.dtype for one in narrow.parameters()} == {torch.bfloat16}
    for name, value in wide.state_dict().items():
        assert value.dtype in (torch.float32, torch.int64, torch.bool)
        assert torch.equal(value, narrow.state_dict()[name].to(value.dtype)), name


def test_a_norm_keeps_bfloat16_where_autocast_would_take_float32() -> None:
    """CUDA's autocast does, and what follows would be computed in it. There need not be a GPU: tensors have no values."""
    with FakeTensorMode():
        x, norm = torch.empty(4, 8, device="cuda", dtype=torch.bfloat16), network.Norm(8, 1e-5)
        norm.weight = torch.nn.Parameter(torch.empty(8, device="cuda"))
        enable, device = torch.set_autocast_enabled, x.device.type  # torch.autocast refuses to without a GPU
        enable(device, True)  # noqa: FBT003 - torch's signature
        try:
            assert torch.nn.functional.rms_norm(x, (8,)).dtype == torch.float32
            assert norm(x).dtype == torch.bfloat16
        finally:
            enable(device, False)  # noqa: FBT003 - torch's signature
