"""However a weight is kept, it gives what the plain one gives, for any number of rows."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from updraft_inference.torch_engine.model.linear import AmxLinear, linear
from updraft_kernels.loader import Kernels


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
