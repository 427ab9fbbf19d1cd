"""A step of the draft by the C++ kernels is the same step by torch's operations, and serves what a swap brought."""

import math
from dataclasses import dataclass
from typing import Self

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from updraft_artifacts.rope import Rope
from updraft_draft.config import DraftConfig
from updraft_draft.network import DraftNetwork, initial_network
from updraft_inference.torch_engine.model.draft import PackedDraft, pack
from updraft_inference.torch_engine.model.kv_cache import CacheShape, SlotCache
from updraft_inference.torch_engine.model.linear import Int8Linear
from updraft_kernels.loader import Kernels

NUM_SLOTS, NUM_POSITIONS, VOCAB = 4, 40, 90


@pytest.fixture(scope="module")
def int8(compiled: Kernels) -> Kernels:
    if not compiled.has_int8:
        pytest.skip("this processor does not multiply in int8")
    return compiled


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Shape of a draft."""

    hidden: int = 64
    inner: int = 96
    kv_heads: int = 2
    groups: int = 2
    head_size: int = 16
    vocab: int = 70
    norms_residual: bool = False
    seed: int = 0

    def network(self) -> DraftNetwork:
        config = DraftConfig(
            hidden_size=self.hidden,
            target_hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_heads=self.kv_heads * self.groups,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_size,
            vocab_size=VOCAB,
            draft_vocab_size=self.vocab,
            max_position=NUM_POSITIONS,
            rms_norm_eps=1e-5,
            rope=Rope(theta=10000.0),
            aux_layers=(0, 1, 2),
            norm_before_residual=self.norms_residual,
        )
        generator = torch.Generator().manual_seed(self.seed)
        embedding, head = torch.randn(2, VOCAB, self.hidden, generator=generator)
        network = initial_network(
            config, embedding, head[: self.vocab], torch.ones(self.hidden), torch.arange(self.vocab)
        )
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.data.uniform_(0.5, 1.5, generator=generator)
        network = network.to(torch.bfloat16)
        network.share(embedding.bfloat16())
        return network


@dataclass(frozen=True, slots=True)
class Served:
    """A draft and its cache."""

    draft: PackedDraft
    cache: SlotCache

    @classmethod
    def of(cls, network: DraftNetwork, library: Kernels | None, *, is_native: bool = True) -> Self:
        c = network.config
        draft = PackedDraft(network, library)
        assert (draft._native is not None) == (library is not None)
        if not is_native:
            draft._native = None
        shape = CacheShape(
            num_layers=1,
            num_slots=NUM_SLOTS,
            num_positions=NUM_POSITIONS,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
        )
        return cls(draft, SlotCache(shape, like=network.embedding))

    def step(self, x: Tensor, ids: Tensor, starts: dict[int, int], counts: dict[int, int]) -> Tensor:
        batch = self.cache.batch(list(starts), list(starts.values()), [counts[slot] for slot in starts])
        return self.draft.forward(x, ids, [batch], self.cache)


SHAPES = st.builds(
    Shape,
    hidden=st.sampled_from([32, 64, 96, 200]),
    inner=st.integers(1, 200),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    head_size=st.sampled_from([16, 32, 64]),
    vocab=st.integers(1, VOCAB),
    norms_residual=st.booleans(),
    seed=st.integers(0, 99),
)


@settings(max_examples=40, deadline=None)
@given(
    shape=SHAPES,
    ends=st.dictionaries(st.integers(0, NUM_SLOTS - 1), st.integers(1, NUM_POSITIONS), min_size=1),
    chain=st.integers(1, 3),
)
@torch.inference_mode()
def test_steps_are_those_of_torchs_operations(int8: Kernels, shape: Shape, ends: dict[int, int], chain: int) -> None:
    network = shape.network()
    native, plain = Served.of(network, int8), Served.of(network, int8, is_native=False)
    generator = torch.Generator().manual_seed(shape.seed)
    ends = dict(sorted(ends.items()))
    # Each sequence first reads its rows, and then drafts to its end, which may be that of the slot.
    counts = {slot: max(1, end - chain) for slot, end in ends.items()}
    x = torch.randn(sum(counts.values()), shape.hidden, generator=generator).bfloat16()
    starts = dict.fromkeys(ends, 0)
    while True:
        ids = torch.randint(VOCAB, (len(x),), generator=generator)
        y, expected = (served.step(x, ids, starts, counts) for served in (native, plain))
        assert_near(y, expected)
        for actual, written in zip(native.cache.of_layer(0), plain.cache.of_layer(0), strict=True):
            assert_near(actual, written)
        logits, top = native.draft.head(y)
        assert_near(logits, plain.draft.head(y)[0])
        assert torch.equal(top.best_R, logits.amax(-1))
        assert torch.equal(top.choice_R, logits.argmax(-1))
        torch.testing.assert_close(top.log_sum_R, logits.logsumexp(-1))
        last = torch.tensor(list(counts.values())).cumsum(0) - 1
        starts = {slot: start + counts[slot] for slot, start in starts.items() if start + counts[slot] < ends[slot]}
        if not starts:
            return
        x = expected[[at for at, slot in zip(last.tolist(), counts, strict=True) if slot in starts]]
        counts = dict.fromkeys(starts, 1)


@torch.inference_mode()
def test_a_copied_prefix_continues_as_the_original_to_the_bit(int8: Kernels) -> None:
    network = Shape().network()
    served, generator = Served.of(network, int8), torch.Generator().manual_seed(0)
    x, ids = torch.randn(30, 64, generator=generator).bfloat16(), torch.arange(30)
    served.step(x, ids, {1: 0}, {1: 30})
    served.cache.copy_prefix(1, 3, 20)
    both = served.step(x[[20, 20]], ids[[20, 20]], {1: 20, 3: 20}, {1: 1, 3: 1})
    assert torch.equal(both[0], both[1])


@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_whatever_is_beside_it(int8: Kernels) -> None:
    network = Shape().network()
    together, alone = Served.of(network, int8), Served.of(network, int8)
    generator = torch.Generator().manual_seed(0)
    x, ids = torch.randn(9, 64, generator=generator).bfloat16(), torch.arange(9)
    y = together.step(x, ids, {0: 3, 1: 0, 2: 35}, {0: 1, 1: 7, 2: 1})
    assert torch.equal(alone.step(x[1:8], ids[1:8], {1: 0}, {1: 7}), y[1:8])
    assert torch.equal(alone.draft.head(y[1:8])[0], together.draft.head(y)[0][1:8])


@torch.inference_mode()
def test_what_is_not_finite_shows_in_its_row_and_in_no_other(int8: Kernels) -> None:
    served = Served.of(Shape().network(), int8)
    x = torch.ones(3, 64).bfloat16()
    x[1, 5] = math.nan
    y = served.step(x, torch.arange(3), {0: 0, 1: 0, 2: 0}, {0: 1, 1: 1, 2: 1})
    assert y.isfinite().all(-1).tolist() == [True, False, True]
    top = served.draft.head(y)[1]
    assert (top.best_R - top.log_sum_R).isfinite().tolist() == [True, False, True]


NAMES = [name for name, tensor in Shape().network().state_dict().items() if tensor.is_floating_point()]


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_swap_exchanges_every_tensor_and_proves_it(library: Kernels | None, name: str) -> None:
    network = Shape().network()
    draft = PackedDraft(network, library)
    tensors = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    tensors[name] += torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = outcome(draft, network)
    packed = pack(tensors, like=network.lm_head.weight, library=library)
    assert draft.is_current()
    network.state_dict()[name].copy_(tensors[name])
    assert draft.is_current() == (tensors[name].ndim == 1), "norms serve from the network itself"
    draft.exchange(packed)
    assert draft.is_current()
    after = outcome(draft, network)
    assert not torch.equal(after, before)
    assert torch.equal(after, outcome(PackedDraft(network, library), network))


def test_a_served_copy_with_one_other_bit_is_not_proved(int8: Kernels) -> None:
    draft = PackedDraft(Shape().network(), int8)
    head = draft._weights.head
    assert isinstance(head, Int8Linear)
    assert draft.is_current()
    head._blocks[1, 2, 3, 0] ^= 1
    assert not draft.is_current()


def outcome(draft: PackedDraft, network: DraftNetwork) -> Tensor:
    """Logits after two steps of one sequence."""
    c = network.config
    shape = CacheShape(num_layers=1, num_slots=1, num_positions=4, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim)
    cache = SlotCache(shape, like=network.embedding)
    aux = torch.randn(2, c.aux_size, generator=torch.Generator().manual_seed(2)).bfloat16()
    y = draft.forward(draft.fuse(aux), torch.tensor([3, 4]), [cache.batch([0], [0], [2])], cache)[-1:]
    y = draft.forward(y, torch.tensor([5]), [cache.batch([0], [2], [1])], cache)
    return draft.head(y)[0]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """The native step rounds to bfloat16 at fewer places, and so to other integers of 8 bits."""
    assert (actual - expected).float().norm() <= 0.03 * expected.float().norm() + 1e-3
