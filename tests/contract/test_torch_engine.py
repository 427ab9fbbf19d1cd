"""The torch engine, on a tiny target, keeps the promises of the port."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contract.engine_contract import MAX_QUEUED, NUM_SLOTS, EngineContract
from tests.support.tiny_target import every_second_token, make_draft, make_tiny_target, save_draft

from updraft_inference.engine import DraftCheckpoint, FinishedRequest
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target")


class TestTorchEngine(EngineContract):
    device = "cpu"

    @pytest.fixture
    def heard(self) -> list[FinishedRequest]:
        return []

    @pytest.fixture
    async def engine(self, target: Path, heard: list[FinishedRequest]) -> AsyncIterator[TorchEngine]:
        limits = Limits(num_slots=NUM_SLOTS, max_context=128, max_lookahead=3)
        options = EngineOptions(limits=limits, dtype=torch.float32, device=self.device, max_queued=MAX_QUEUED)
        async with TorchEngine.open(target, options, heard.append) as engine:
            yield engine

    @pytest.fixture
    def drafts(self, target: Path, tmp_path: Path) -> list[DraftCheckpoint]:
        return [_draft(target, tmp_path, version) for version in (1, 2)]

    @pytest.fixture
    def corrupt(self, target: Path, tmp_path: Path) -> DraftCheckpoint:
        draft = _draft(target, tmp_path, 3)
        tensors = load_file(draft.folder / "model.safetensors")
        tensors["fc.weight"][0, 0] += 1
        save_file(tensors, draft.folder / "model.safetensors")
        return draft


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
class TestTorchEngineOnGpu(TestTorchEngine):
    device = "cuda"


def _draft(target: Path, folder: Path, version: int) -> DraftCheckpoint:
    path = folder / str(version)
    digest = save_draft(make_draft(target, seed=version, token_ids=every_second_token(version)), path)
    return DraftCheckpoint(version=version, folder=path, tensors_digest=digest)
