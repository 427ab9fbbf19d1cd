"""The agent's view of the small server of tests.support.sglang_server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.support.sglang_server import ADMIN, FakeSglang, running, saved_draft
from tests.support.tap_plugin import hello
from tests.support.tiny_target import DRAFT_VOCAB, make_tiny_target
from tests.support.wait import until

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_artifacts.model_folder import target_fingerprint
from updraft_inference.engine import DraftCheckpoint, LoadedDraft
from updraft_inference.sidecar.assembly import Assembler
from updraft_inference.sidecar.attached import Known
from updraft_inference.sidecar.hello import Hello
from updraft_inference.sidecar.link import Link
from updraft_inference.sidecar.sglang.attached import AttachedSglang, Folders
from updraft_inference.sidecar.sglang.server import SglangServer
from updraft_inference.tap import initial_draft
from updraft_inference.tap.server_kind import SGLANG


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


@dataclass(slots=True, kw_only=True)
class Beside:
    """An agent beside the server, whose plugin says what the test wants."""

    fake: FakeSglang
    models: Path
    data: Path
    changes: list[LoadedDraft] = field(default_factory=list)

    @property
    def note(self) -> Path:
        """The file that exists during a swap."""
        return self.data / "sglang-swap"

    @asynccontextmanager
    async def unheard(self, *, key: str = ADMIN) -> AsyncIterator[AttachedSglang]:
        """Before the plugin has connected."""
        target = self.models / "target"
        attached = AttachedSglang(
            Link(self.data / "s", SGLANG, Assembler(max_bytes=1), lambda _: None),
            Known(fingerprints=(target_fingerprint(target), "sha256:k")),
            SglangServer(self.fake.url, admin_key=key),
            Folders(model=target, drafts=self.models / "drafts", note=self.note),
            on_change=lambda: self.changes.append(attached.loaded),
        )
        async with attached.running():
            yield attached

    @asynccontextmanager
    async def attached(self, **says: Any) -> AsyncIterator[AttachedSglang]:
        """When it is known what the server holds, whose plugin `says` more than that it is there."""
        async with self.unheard() as server:
            await self.meet(server, **says)
            yield server

    async def meet(self, server: AttachedSglang, **says: Any) -> None:
        """The plugin connects, and the draft becomes known."""
        num_changes = len(self.changes)
        server.hear(greeting(**says))
        await until(lambda: len(self.changes) == num_changes + 2, what="the news of the hello, and of the proof")


def greeting(**says: Any) -> Hello:
    """The hello of rank 0 of two."""
    ours = {"engine": {"name": "SGLang", "version": "0.5.23"}, "ranks": {"tensor": 2}}
    return Hello.of(hello("worker", **{**ours, **says}), SGLANG)


@pytest.fixture
def beside(fake: FakeSglang, models: Path, short_tmp_path: Path) -> Beside:
    return Beside(fake=fake, models=models, data=short_tmp_path)


@pytest.fixture
async def server(beside: Beside) -> AsyncIterator[AttachedSglang]:
    async with beside.attached() as server:
        yield server
