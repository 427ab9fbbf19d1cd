"""The kernel of the default loss computes what torch's operations compute."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from updraft_kernels.loader import load_variant, supported_variants
from updraft_trainer.learning.losses import NativeLosses, Predictions, forward_kl_by_torch

DTYPES = [torch.float32, torch.bfloat16]


def _logits(seed: int, rows: int, vocab: int, spread: float) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def _built() -> Iterator[str]:
    for variant in supported_variants():
        try:
            load_variant(variant)
        except (OSError, AttributeError):
            continue
        yield variant


VARIANTS = list(_built())
pytestmark = pytest.mark.skipif(not VARIANTS, reason="no C++ kernels were built for this CPU")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(0, 9),
    vocab=st.integers(1, 70) | st.sampled_from([1024, 8192, 151_936]),
    spread=st.sampled_from([0.0, 1.0, 4.0, 60.0]),
    offset=st.sampled_from([0.0, -300.0, 900.0]),
)
def test_the_kernel_equals_torch(
    *, variant: str, dtype: torch.dtype, seed: int, rows: int, vocab: int, spread: float, offset: float
) -> None:
    native = NativeLosses(load_variant(variant))
    teacher, draft = ((_logits(seed + i, rows, vocab, spread) + offset).to(dtype) for i in range(2))
    expected = Predictions.by_torch(teacher.double())
    p, negentropy = native.predictions(teacher)
    torch.testing.assert_close(p, expected.p.float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(negentropy, expected.negentropy.float(), rtol=1e-5, atol=1e-5)
    losses, gradients = native.forward_kl(draft, p, negentropy)
    of_torch = forward_kl_by_torch(draft.double(), expected)
    torch.testing.assert_close(losses, of_torch[0].float(), rtol=1e-5, atol=1e-5)
    assert gradients.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(gradients.float(), of_torch[1].float(), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_that_is_not_finite_has_a_loss_that_is_not_finite_and_spoils_no_other(variant: str) -> None:
    native = NativeLosses(load_variant(variant))
    draft = _logits(0, 3, 40, 1.0)
    teacher = _logits(1, 3, 40, 1.0)
    draft[0, 7] = float("nan")
    teacher[2, 39] = float("inf")
    losses, gradients = native.forward_kl(draft, *native.predictions(teacher))
    assert gradients[1].isfinite().all()
    assert losses.isfinite().tolist() == [False, True, False]


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_that_a_top_k_teacher_excludes_count_nothing(variant: str) -> None:
    native = NativeLosses(load_variant(variant))
    teacher = torch.full((1, 33), -110.0)
    teacher[0, 5] = 0.0
    p, negentropy = native.predictions(teacher)
    assert p[0].nonzero().tolist() == [[5]]
    assert negentropy.tolist() == [0.0]
    losses, gradients = native.forward_kl(teacher, p, negentropy)
    assert (losses.tolist(), gradients.abs().sum().item()) == ([0.0], 0.0)
