"""Products are those of the numbers given, in whichever type the device multiplies fast."""

import pytest
import torch

from updraft_draft import precision

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def is_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("num_rows", [0, 1, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_long_weight_gives_the_same_product_in_parts(*, num_rows: int, dtype: torch.dtype, is_fast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 24, generator=generator).bfloat16()
    weight = torch.randn(2 * precision.WEIGHTS_TOGETHER + 3, 24, generator=generator).to(dtype)
    actual = precision.linear(x, weight)
    assert actual.dtype == (torch.bfloat16 if is_fast and dtype == torch.bfloat16 else torch.float32)
    torch.testing.assert_close(actual.double(), x.double() @ weight.double().T, rtol=1e-2, atol=1e-2)


def test_tensors_in_float32_are_multiplied_in_the_type_that_is_fast(*, is_fast: bool) -> None:
    x = torch.randn(4, 8)
    with precision.autocast(CPU):
        assert (x @ x.T).dtype == precision.product_dtype(CPU) == (torch.bfloat16 if is_fast else torch.float32)


def test_every_gpu_multiplies_bfloat16(*, is_fast: bool) -> None:
    assert precision.product_dtype(torch.device("cuda")) == torch.bfloat16, is_fast
