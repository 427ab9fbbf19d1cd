"""A packed weight gives what the plain one gives, for any number of rows."""

import pytest
import torch

from updraft_inference.torch_engine.linear import Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 8, 70])
def test_it_is_the_product_with_the_weight(dtype: torch.dtype, num_rows: int, *, has_bias: bool) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 48, generator=random).to(dtype)
    bias = torch.randn(96, generator=random).to(dtype) if has_bias else None
    x = torch.randn(num_rows, 2 * 48, generator=random).to(dtype)[:, :48]  # rows that do not lie together
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.inference_mode():
        found = Linear(weight, bias)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * 5)
