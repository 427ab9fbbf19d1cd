"""However a weight is kept, it gives what the plain one gives, for any number of rows."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from updraft_inference.torch_engine.model.linear import GROUP, AmxLinear, Int8Linear, Linear, WideningLinear, linear
from updraft_kernels.loader import Kernels, load_variant, supported_variants


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.fixture(scope="module")
def tiled(compiled: Kernels) -> Kernels:
    if not compiled.has_amx:
        pytest.skip("this processor has no tiles for bfloat16")
    return compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(96, 64), (96, 48), (90, 64)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 8, 70])
def test_it_is_the_product_with_the_weight(
    library: Kernels | None, dtype: torch.dtype, size: tuple[int, int], num_rows: int, *, has_bias: bool
) -> None:
    weight = random(*size, seed=0, dtype=dtype)
    bias = random(size[0], seed=1, dtype=dtype) if has_bias else None
    x = random(num_rows, 2 * size[1], seed=2, dtype=dtype)[:, : size[1]]  # rows that do not lie together
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    map_ = linear(weight, bias, library=library)
    with torch.inference_mode():
        actual = map_(x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), exact(x, weight, bias), rtol=tolerance, atol=tolerance * 5)
    assert torch.equal(map_.weight, weight)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 100), out=st.integers(1, 9), of=st.integers(1, 20), has_bias=st.booleans())
def test_tiles_give_the_product_rounded_once_for_any_sizes(
    tiled: Kernels, rows: int, out: int, of: int, *, has_bias: bool
) -> None:
    weight, x = random(16 * out, 32 * of, seed=rows), random(rows, 32 * of, seed=out)
    bias = random(16 * out, seed=of) if has_bias else None
    actual = AmxLinear(weight, bias, tiled)(x)
    torch.testing.assert_close(actual.double(), exact(x, weight, bias), rtol=2**-8, atol=1e-4 * of)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), others=st.integers(0, 70), before=st.integers(0, 70))
def test_a_row_of_tiles_is_the_same_to_the_bit_whatever_is_beside_it(
    tiled: Kernels, rows: int, others: int, before: int
) -> None:
    product = AmxLinear(random(48, 96, seed=0), None, tiled)
    own, more = random(rows, 96, seed=1), random(before + others, 96, seed=2)
    together = product(torch.cat([more[:before], own, more[before:]]))
    assert torch.equal(together[before : before + rows], product(own))


def test_what_is_not_finite_stays_in_its_row(tiled: Kernels) -> None:
    x = random(20, 64, seed=0)
    x[3, 5], x[17, 0] = math.nan, math.inf
    finite = AmxLinear(random(32, 64, seed=1), None, tiled)(x).isfinite().all(-1)
    assert finite.tolist() == [row not in {3, 17} for row in range(20)]


def test_torchs_own_products_stay_right_beside_tiles(tiled: Kernels) -> None:
    x, weight = random(40, 128, seed=0), random(64, 128, seed=1)
    ours, theirs = AmxLinear(weight, None, tiled), linear(weight)
    expected = ours(x).clone(), theirs(x).clone(), x @ x.T
    for _ in range(20):
        assert torch.equal(ours(x), expected[0])
        assert torch.equal(theirs(x), expected[1])
        assert torch.equal(x @ x.T, expected[2])


@pytest.fixture(scope="module")
def widening(compiled: Kernels) -> Kernels:
    """The variant for CPUs with AVX2, also where another one is faster."""
    if "avx2" not in supported_variants():
        pytest.skip(f"this processor's kernels are {compiled.variant}")
    return load_variant("avx2")


@pytest.mark.parametrize(("out", "kind"), [(96, WideningLinear), (90, Linear)])
def test_without_torchs_kernels_for_bfloat16_weights_are_widened_where_blocks_of_them_fit(
    monkeypatch: pytest.MonkeyPatch, widening: Kernels, out: int, kind: type[Linear]
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)

    assert type(linear(random(out, 64, seed=0), library=widening)) is kind


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 40), out=st.integers(1, 9), of=st.integers(1, 70), has_bias=st.booleans())
def test_widened_weights_give_the_product_rounded_once_for_any_sizes(
    widening: Kernels, rows: int, out: int, of: int, *, has_bias: bool
) -> None:
    weight, x = random(16 * out, of, seed=rows), random(rows, of, seed=out)
    bias = random(16 * out, seed=of) if has_bias else None
    product = WideningLinear(weight, bias, widening)
    torch.testing.assert_close(product(x).double(), exact(x, weight, bias), rtol=2**-8, atol=1e-5 * of)
    assert torch.equal(product.weight, weight)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 20), others=st.integers(0, 20), before=st.integers(0, 20))
def test_a_row_with_widened_weights_is_the_same_to_the_bit_whatever_is_beside_it(
    widening: Kernels, rows: int, others: int, before: int
) -> None:
    product = WideningLinear(random(144, 96, seed=0), None, widening)
    own, more = random(rows, 96, seed=1), random(before + others, 96, seed=2)
    together = product(torch.cat([more[:before], own, more[before:]]))
    assert torch.equal(together[before : before + rows], product(own))


def test_what_is_not_finite_stays_in_its_row_with_widened_weights(widening: Kernels) -> None:
    x = random(20, 64, seed=0)
    x[3, 5], x[17, 0] = math.nan, math.inf
    finite = WideningLinear(random(32, 64, seed=1), None, widening)(x).isfinite().all(-1)
    assert finite.tolist() == [row not in {3, 17} for row in range(20)]


@pytest.fixture(scope="module")
def int8(compiled: Kernels) -> Kernels:
    if not compiled.has_int8:
        pytest.skip("this processor does not multiply in int8")
    return compiled


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    out=st.integers(1, 70),
    of=st.integers(1, 400),
    huge=st.sampled_from([1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_eight_bits_give_the_product_to_half_a_unit_of_each_weights_and_inputs_scale(
    int8: Kernels, rows: int, out: int, of: int, huge: float, seed: int
) -> None:
    weight, x = random(out, of, seed=seed), random(rows, of, seed=seed + 1)
    x[:, :1] *= huge  # spoils the inputs of its own group, and no other
    map_ = linear(weight, library=int8, may_round=True)
    assert isinstance(map_, Int8Linear)
    groups = [group.double() for group in torch.split(x, GROUP, 1)]
    steps = torch.cat([g.abs().amax(1, keepdim=True).expand_as(g) / 127 for g in groups], 1)
    of_weights = x.double().abs().sum(1, keepdim=True) * weight.double().abs().amax(1) / 127 / 2
    of_inputs = steps / 2 @ map_.weight.double().abs().T
    expected = exact(x, weight, None)
    error = (map_(x).double() - expected).abs()
    assert (error <= of_weights + of_inputs + expected.abs() * 2**-8 + 1e-2 * (of_weights + of_inputs) + 1e-6).all()
    assert ((map_.weight - weight).abs() <= weight.abs().amax(1, keepdim=True).float() / 127 * 0.501).all()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 30), others=st.integers(0, 30), before=st.integers(0, 30))
def test_a_row_in_eight_bits_is_the_same_to_the_bit_whatever_is_beside_it(
    int8: Kernels, rows: int, others: int, before: int
) -> None:
    product = Int8Linear(random(50, 100, seed=0), int8)
    own, more = random(rows, 100, seed=1), random(before + others, 100, seed=2)
    together = product(torch.cat([more[:before], own, more[before:]]))
    assert torch.equal(together[before : before + rows], product(own))


def test_in_eight_bits_what_is_not_finite_stays_in_its_row(int8: Kernels) -> None:
    x = random(20, 100, seed=0)
    x[3, 5], x[17, 0], x[18, 99] = math.nan, math.inf, -math.inf
    x[4], x[5, 7] = 1e-39, 1e30
    finite = Int8Linear(random(32, 100, seed=1), int8)(x).isfinite()
    assert finite.all(-1).tolist() == [row not in {3, 17, 18} for row in range(20)]
    assert not finite[[3, 17, 18]].any()


def test_a_weight_holds_what_it_was_made_of_and_nothing_else(library: Kernels | None) -> None:
    weight = random(48, 64, seed=0)
    weight[0] = 0  # an output without a scale
    for may_round in (False, True):
        map_ = linear(weight, library=library, may_round=may_round)
        assert map_.holds(weight)
        changed = weight.clone()
        changed[7, 9] *= 2
        assert not map_.holds(changed)
        assert (map_(random(3, 64, seed=1))[:, 0] == 0).all()
