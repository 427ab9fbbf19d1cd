"""The fake keeps the promises that tests of the edges rely on."""

import hashlib
from pathlib import Path

import pytest
from tests.contract.engine_contract import EngineContract
from tests.support.fake_engine import FakeEngine

from updraft_inference.engine import DraftCheckpoint, FinishedRequest


def _draft(folder: Path, version: int, content: bytes) -> DraftCheckpoint:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return DraftCheckpoint(version=version, folder=folder, tensors_digest=digest)


class TestFakeEngine(EngineContract):
    @pytest.fixture
    def heard(self) -> list[FinishedRequest]:
        return []

    @pytest.fixture
    async def engine(self, heard: list[FinishedRequest]) -> FakeEngine:
        return FakeEngine(on_finished=heard.append, max_context=128)

    @pytest.fixture
    def drafts(self, tmp_path: Path) -> list[DraftCheckpoint]:
        return [_draft(tmp_path / str(version), version, b"weights %d" % version) for version in (1, 2)]

    @pytest.fixture
    def corrupt(self, tmp_path: Path) -> DraftCheckpoint:
        draft = _draft(tmp_path / "3", 3, b"weights 3")
        (draft.folder / "model.safetensors").write_bytes(b"weighty 3")
        return draft
