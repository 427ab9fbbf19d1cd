import pytest
import torch
from tests.support.ranks import run_ranks

from updraft_chassis.errors import Conflict
from updraft_trainer.coordination.ranks import Ranks
from updraft_trainer.learning.compute import PACK_TOKENS, Compute


def show_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(("capability", "chosen"), [((8, 0), "cuda"), ((9, 0), "cuda"), ((7, 5), "cpu"), (None, "cpu")])
def test_auto_takes_the_gpu_that_can_train(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, chosen: str
) -> None:
    show_gpu(monkeypatch, capability)
    compute = Compute.on("auto")
    assert (compute.device.type, compute.pack_tokens) == (chosen, PACK_TOKENS[chosen])
    assert Compute.on("cpu", pack_tokens=64).pack_tokens == 64


@pytest.mark.parametrize(
    ("capability", "problem"), [(None, "sees no GPU"), ((7, 5), "has compute capability 7.5, and bfloat16 needs 8.0")]
)
def test_a_gpu_that_is_asked_for_and_cannot_train_is_told(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, problem: str
) -> None:
    show_gpu(monkeypatch, capability)
    with pytest.raises(Conflict, match=f"UPDRAFT_TRAINER_DEVICE is cuda, but .*{problem}"):
        Compute.on("cuda")


def test_an_old_gpu_that_auto_leaves_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    show_gpu(monkeypatch, (7, 5))
    Compute.on("auto")
    assert "Training on the CPU, because the GPU has compute capability 7.5" in caplog.text


def test_passes_on_a_cpu_are_in_float32_if_it_has_no_products_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert Compute.on("cpu").dtype == Compute().dtype == torch.float32
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert Compute.on("cpu").dtype == Compute().dtype == torch.bfloat16


def _joins_without_a_gpu_on_rank_1(ranks: Ranks) -> str:
    """No rank gets as far as to touch a GPU."""
    with pytest.raises(Conflict) as raised:
        Compute(device=torch.device("cpu" if ranks.rank == 1 else "cuda")).on_ranks(ranks)
    return str(raised.value)


def test_ranks_on_unlike_devices_end_and_name_the_one_without_a_gpu() -> None:
    for message in run_ranks(_joins_without_a_gpu_on_rank_1):
        assert message.startswith("rank 1 of 2 has no GPU to train on, but the others have one;")
