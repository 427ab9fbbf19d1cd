"""Every variant of the C++ kernels that this CPU runs gives the results of torch's operations."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from updraft_inference.settings import InferenceSettings
from updraft_inference.torch_engine.model.kv_cache import CacheShape, SlotCache
from updraft_inference.torch_engine.model.limits import Limits
from updraft_inference.torch_engine.model.native_ops import LANES, WIDEST, NativeOps, operations
from updraft_inference.torch_engine.model.ops import AttentionContext, Heads, TorchOps
from updraft_kernels.loader import Kernels, load_variant, supported_variants

NUM_SLOTS, NUM_POSITIONS = 4, 60 + WIDEST
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(scope="module", params=supported_variants())
def compiled(compiled: Kernels, request: pytest.FixtureRequest) -> Kernels:
    """Each variant in turn, where any was built."""
    return load_variant(request.param)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """More than one, whatever the tests run with: each kernel shares its work out."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """To float32's precision, or to a few of bfloat16's roundings, which operations of torch do more of."""
    rtol, atol = (1e-4, 1e-5) if actual.dtype == torch.float32 else (2e-2, 4e-2)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), size=st.integers(1, 200), has_y=st.booleans(), dtype=DTYPES, seed=st.integers(0, 99))
def test_norms_and_gates_are_those_of_torch(
    compiled: Kernels, rows: int, size: int, *, has_y: bool, dtype: torch.dtype, seed: int
) -> None:
    fused = NativeOps(compiled, dtype)
    x, y = (random(rows, size, seed=seed + n, dtype=dtype) for n in range(2))
    before, weight = x.clone(), random(size, seed=seed + 2, dtype=dtype)
    for actual, expected in zip(
        fused.add_norm(x, y if has_y else None, weight, 1e-5),
        TorchOps().add_norm(x, y if has_y else None, weight, 1e-5),
        strict=True,
    ):
        assert_near(actual, expected)
    assert torch.equal(x, before), "what is read is not written"
    both = 30 * random(rows, 2 * size, seed=seed + 3, dtype=dtype)  # where e^-x leaves float32 too
    assert_near(fused.gate(both), TorchOps().gate(both))


@settings(max_examples=60, deadline=None)
@given(
    wanted=st.lists(st.booleans(), min_size=1, max_size=9),
    vocab=st.integers(1, 3000),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_peaks_of_logits_are_those_of_torch(
    compiled: Kernels, wanted: list[bool], vocab: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    logits = (scale * random(len(wanted), vocab, seed=seed)).to(dtype)  # in bfloat16 many are equal
    ours, theirs = (each.top_scores(logits, wanted) for each in (NativeOps(compiled, dtype), TorchOps()))
    assert torch.equal(ours.best_R, theirs.best_R.float())
    first = [row.tolist().index(best) for row, best in zip(logits, theirs.best_R.tolist(), strict=True)]
    assert ours.choice_R.tolist() == first
    torch.testing.assert_close(ours.log_sum_R, theirs.log_sum_R, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1500, 2999])
def test_logits_that_are_no_numbers_show_in_their_row(compiled: Kernels, bad: float, place: int) -> None:
    logits = random(3, 3000, seed=1, dtype=torch.bfloat16)
    logits[1, place] = bad
    for each in (NativeOps(compiled, torch.bfloat16), TorchOps()):
        assert each.top_scores(logits, [True] * 3).best_R.isfinite().tolist() == [True, False, True]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(1, WIDEST)), min_size=1, max_size=NUM_SLOTS),
    prompt=st.one_of(st.none(), st.tuples(st.integers(0, 40), st.integers(1, 40))),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    window=st.sampled_from([0, 0, 1, 7, 40]),
    has_norms=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
@example(lengths=[(64, 16)], prompt=None, heads=(3, 3, 4), window=0, has_norms=False, dtype=torch.bfloat16, seed=1)
def test_rows_of_any_lengths_attend_as_in_torch_and_leave_the_same_cache(
    compiled: Kernels,
    *,
    lengths: list[tuple[int, int]],
    prompt: tuple[int, int] | None,
    heads: tuple[int, int, int],
    window: int,
    has_norms: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    num_kv, group, lanes = heads
    size = lanes * LANES
    norms = [random(size, seed=seed + n, dtype=dtype) if has_norms else None for n in (1, 2)]
    shape = Heads(
        num=num_kv * group, num_kv=num_kv, size=size, scale=size**-0.5, q_norm=norms[0], k_norm=norms[1], eps=1e-5
    )
    slots = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(seed)).tolist()
    if prompt is not None:
        lengths = lengths[: NUM_SLOTS - 1]
    places = sorted(slots[: len(lengths)])
    outputs, caches = [], []
    for operation in (NativeOps(compiled, dtype), TorchOps()):
        size_of_cache = CacheShape(
            num_layers=2, num_slots=NUM_SLOTS, num_positions=NUM_POSITIONS, num_kv_heads=num_kv, head_dim=size
        )
        cache = SlotCache(size_of_cache, like=torch.zeros(1, dtype=dtype))
        keys, values = cache.of_layer(1)
        keys.copy_(random(*keys.shape, seed=seed + 3))
        values.copy_(random(*values.shape, seed=seed + 4))
        batches = [cache.batch(places, [start for start, _ in lengths], [count for _, count in lengths])]
        if prompt is not None:
            batches.append(cache.batch([slots[len(lengths)]], [prompt[0]], [prompt[1]]))
        num_rows = sum(len(batch.rows_R) for batch in batches)
        qkv = random(num_rows, (shape.num + 2 * num_kv) * size, seed=seed + 5, dtype=dtype)
        turns = random(num_rows, size, seed=seed + 6)
        sight = AttentionContext(batches=batches, cos=turns.cos().to(dtype), sin=turns.sin().to(dtype), window=window)
        outputs.append(operation.attend(qkv, shape, sight, cache, 1))
        caches.append(torch.stack(cache.of_layer(1)))
        assert not torch.stack(cache.of_layer(0)).any(), "another layer's"
    assert_near(*outputs)
    assert_near(*caches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_finite_shows_and_reaches_no_other_sequence(compiled: Kernels, dtype: torch.dtype) -> None:
    """Whoever gave it is broken off by what its logits say, and so only it."""
    fused, size = NativeOps(compiled, dtype), 2 * LANES
    shape = CacheShape(num_layers=1, num_slots=2, num_positions=20, num_kv_heads=1, head_dim=size)
    turns = torch.zeros(2, size, dtype=dtype)
    for bad in (math.nan, math.inf, -math.inf):
        cache = SlotCache(shape, like=torch.zeros(1, dtype=dtype))
        qkv = random(2, 3 * size, seed=1, dtype=dtype)
        qkv[0] = bad
        sight = AttentionContext(batches=[cache.batch([0, 1], [0, 0], [1, 1])], cos=turns + 1, sin=turns)
        out = fused.attend(qkv, Heads(num=1, num_kv=1, size=size, scale=1.0), sight, cache, 0)
        assert not out[0].isfinite().all()
        assert out[1].isfinite().all()
        _, normed = fused.add_norm(qkv, None, torch.ones(3 * size, dtype=dtype), 1e-5)
        assert not normed[0].isfinite().all()
        assert normed[1].isfinite().all()
        assert not fused.gate(torch.full((1, 8), math.nan, dtype=dtype)).isfinite().any()


def test_nobody_drafts_more_than_attends_here() -> None:
    most = max(Limits(num_slots=1, max_context=1, max_lookahead=0).max_lookup, 16)  # of UPDRAFT_INFERENCE_LOOKAHEAD
    with pytest.raises(ValidationError):
        InferenceSettings(model=Path("m"), lookahead=most + 1)
    assert most < WIDEST


def test_where_torch_attends_faster_it_does(compiled: Kernels) -> None:
    shape, heads = (
        CacheShape(num_layers=1, num_slots=1, num_positions=9, num_kv_heads=1, head_dim=16),
        Heads(num=1, num_kv=1, size=16, scale=1.0),
    )
    cache = SlotCache(shape, like=torch.zeros(1))
    sight = AttentionContext(batches=[cache.batch([0], [0], [3])], cos=torch.ones(3, 16), sin=torch.zeros(3, 16))
    qkv, fused = random(3, 48, seed=1), NativeOps(compiled, torch.float32, attends=False)
    assert fused.pads
    assert torch.equal(fused.attend(qkv, heads, sight, cache, 0), TorchOps().attend(qkv, heads, sight, cache, 0))


def test_they_serve_what_they_can_and_torch_the_rest(compiled: Kernels) -> None:
    assert isinstance(operations(compiled, like=torch.zeros(1), head_dim=64), NativeOps)
    assert not isinstance(operations(compiled, like=torch.zeros(1), head_dim=24), NativeOps)
    assert not isinstance(operations(compiled, like=torch.zeros(1, dtype=torch.float16), head_dim=64), NativeOps)
    assert not isinstance(operations(compiled, like=torch.zeros(1, device="meta"), head_dim=64), NativeOps)
    assert not isinstance(operations(None, like=torch.zeros(1), head_dim=64), NativeOps)
