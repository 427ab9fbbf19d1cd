"""An engine over the small server of tests.support.sglang_server."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.sglang_server import ADMIN, FakeSglang, running, saved_draft
from tests.support.tiny_target import DRAFT_VOCAB, make_tiny_target

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_inference.engine import DraftCheckpoint, FinishedRequest
from updraft_inference.sglang_engine.engine import SglangEngine, SglangOptions, opened
from updraft_inference.sglang_engine.server import SglangServer
from updraft_inference.tap import initial_draft


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, the seed for it, and versions 1 and 2."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_target(folder / "target")
    initial_draft.write(folder / "target", folder / "seed", ShapeChoice(draft_vocab_size=DRAFT_VOCAB))
    return folder


@pytest.fixture(scope="module")
def drafts(models: Path) -> list[DraftCheckpoint]:
    return [saved_draft(models, version) for version in (1, 2)]


@pytest.fixture
async def fake(models: Path) -> AsyncIterator[FakeSglang]:
    async with running(FakeSglang(target=models / "target", seed=models / "seed")) as server:
        yield server


@pytest.fixture
def heard() -> list[FinishedRequest]:
    return []


@pytest.fixture
def options(models: Path, short_tmp_path: Path) -> SglangOptions:
    return SglangOptions(
        model=models / "target",
        socket=short_tmp_path / "s",
        note=short_tmp_path / "swap",
        drafts=models / "drafts",
        max_queued=2,
        hello_s=0.0,
        probe_s=0.05,
    )


@pytest.fixture
async def engine(fake: FakeSglang, options: SglangOptions, heard: list[FinishedRequest]) -> AsyncIterator[SglangEngine]:
    async with SglangServer(fake.url, admin_key=ADMIN) as server, opened(options, server, heard.append) as engine:
        yield engine
