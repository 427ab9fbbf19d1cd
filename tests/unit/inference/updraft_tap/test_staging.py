import pytest
import torch

from updraft_tap import prefills, steps
from updraft_tap.distribution import chosen
from updraft_tap.policy import CapturedRequests, CaptureOptions
from updraft_tap.staging import Staged, copy_stream, elapsed_us, mark

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

INTEREST = CapturedRequests(
    batch_size=4,
    places=(0, 2, 3),
    rids=("a", "c", "d"),
    options=(
        CaptureOptions(),
        CaptureOptions(payload=True, counterfactual_rows=2),
        CaptureOptions(payload=True, prompt_rows=9),
    ),
)
CHUNK = prefills.PromptChunk(start=0, end=5, prompt_tokens=5, total_tokens=5, is_first=True)
SPANS = prefills.captured_spans(INTEREST, dict.fromkeys(range(4), CHUNK), range(0, 20, 5), range(4))


def test_on_a_cpu_the_tensors_are_handed_over_as_they_are() -> None:
    values = torch.arange(6.0)

    staged = Staged({"values": values}, copy_stream(torch.device("cpu")))

    assert staged.wait()["values"] is values
    assert staged.num_bytes == 24


def test_on_a_cpu_time_is_the_clocks() -> None:
    start = mark(None)
    assert elapsed_us(start, mark(None)) >= 0


def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="not meta"):
        copy_stream(torch.device("meta"))


def taken(device: torch.device) -> dict[str, torch.Tensor]:
    """All that a step and a prefill take, on this device."""
    g = torch.Generator().manual_seed(0)
    tokens, seq_lens = torch.randint(9, (4, 3), generator=g).to(device), torch.randint(9, (4,), generator=g).to(device)
    logits, aux = torch.randn(12, 9, generator=g).to(device), torch.randn(20, 2, generator=g).to(device)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        step = steps.collect_step_rows(
            steps.even_rows(INTEREST, 3),
            tokens_M=tokens.flatten(),
            positions_S=chosen(seq_lens, INTEREST.places),
            logits_NV=logits,
            states=(aux,),
            top_k=4,
        )
        prefill = prefills.collect_prefill_rows(SPANS, logits_BV=logits, states=(aux,), top_k=4)
        staged = Staged(step | {f"prefill {name}": value for name, value in prefill.items()}, copy_stream(device))
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    logits.fill_(0)
    aux.fill_(0)
    return staged.wait()


@pytest.mark.gpu
@needs_a_gpu
def test_on_a_gpu_the_same_comes_into_pinned_memory_and_nothing_waits() -> None:
    expected, on_gpu = taken(torch.device("cpu")), taken(torch.device("cuda"))

    assert on_gpu.keys() == expected.keys()
    for name, value in on_gpu.items():
        assert value.is_pinned()
        torch.testing.assert_close(value, expected[name])


@pytest.mark.gpu
@needs_a_gpu
def test_on_a_gpu_time_is_that_of_its_work() -> None:
    stream = copy_stream(torch.device("cuda"))
    start = mark(stream)
    torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # torch

    assert elapsed_us(start, mark(stream)) > 1000
