import pytest
import torch

from updraft_tap.distribution import chosen, judged, log_probs, teacher


@pytest.mark.parametrize("rows", [0, 1, 256, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_judged_in_float32_however_many_they_are(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = (8 * torch.randn(rows, 50, generator=generator)).to(dtype)
    ids = torch.randint(50, (rows,), generator=generator)

    log_p, top = judged(logits, ids, 5)

    expected = logits.double().log_softmax(-1)
    assert torch.allclose(log_p.double(), expected.gather(-1, ids[:, None])[:, 0], atol=1e-5)
    assert torch.equal(log_p, log_probs(logits, ids))
    assert torch.equal(logits.gather(-1, top.ids.long()), logits.topk(5).values)
    assert torch.allclose(top.log_probs.double(), expected.gather(-1, top.ids.long()), atol=1e-5)
    assert torch.allclose(top.log_sum_exp.double(), logits.double().logsumexp(-1), atol=1e-5)
    assert (log_p.dtype, *(one.dtype for one in top)) == (torch.float32, torch.int32, torch.float32, torch.float32)
    assert all(map(torch.equal, top, teacher(logits, 5)))


def test_a_token_that_cannot_come_has_no_probability_and_the_others_keep_theirs() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 2.0]])

    log_p, top = judged(logits, torch.tensor([0]), 2)

    assert log_p.tolist() == [-torch.inf]
    assert top.ids.tolist() == [[2, 1]]
    assert torch.allclose(top.log_sum_exp, logits.logsumexp(-1))


@pytest.mark.parametrize(("places", "is_view"), [([], True), ([0, 1], True), ([2, 3], True), ([1, 3], False)])
def test_entries_that_follow_one_another_are_not_copied(places: list[int], *, is_view: bool) -> None:
    values = torch.arange(8).view(4, 2)

    found = chosen(values, places)

    assert found.tolist() == [values[place].tolist() for place in places]
    assert (found.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()) is is_view
