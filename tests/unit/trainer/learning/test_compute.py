import pytest
import torch

from updraft_chassis.errors import Conflict
from updraft_trainer.learning.compute import PACK_TOKENS, Compute


@pytest.mark.parametrize(("has_gpu", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch, chosen: str, *, has_gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    compute = Compute.on("auto")
    assert (compute.device.type, compute.pack_tokens) == (chosen, PACK_TOKENS[chosen])
    assert Compute.on("cpu", pack_tokens=64).pack_tokens == 64


def test_a_gpu_that_is_asked_for_and_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Conflict, match="UPDRAFT_TRAINER_DEVICE is cuda"):
        Compute.on("cuda")
