"""A stock server with Updraft's plugin on the cycle target, started as the adapter needs it, and engines that attach to it."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.contract.engine_contract import MAX_QUEUED, NUM_SLOTS
from tests.sglang.models import cycle_draft, write_cycle_target
from tests.sglang.server import Server
from tests.support.tiny_target import DRAFT_VOCAB, save_draft

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_inference.engine import DraftCheckpoint, FinishedRequest
from updraft_inference.launch import admin_key, program, sglang_arguments
from updraft_inference.sglang_engine.engine import SglangEngine, SglangOptions, opened
from updraft_inference.sglang_engine.server import SglangServer
from updraft_inference.tap import initial_draft, plugin_folder

NUM_STEPS = 2
CONTEXT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A server, what it was started with, and drafts of its vocabulary."""

    server: Server
    folder: Path
    socket: Path
    admin: str

    @property
    def target(self) -> Path:
        return self.folder / "target"

    @property
    def key_file(self) -> Path:
        return self.folder / "server.yaml"

    def options(self, **more: Any) -> SglangOptions:
        said = SglangOptions(model=self.target, socket=self.socket, note=self.folder / "swap", max_queued=MAX_QUEUED)
        return replace(said, **more)

    def saved(self, version: int, quality: float) -> DraftCheckpoint:
        """A draft of which this share of proposals is right."""
        folder = self.folder / "drafts" / str(version)
        digest = save_draft(cycle_draft(self.target, quality=quality), folder)
        return DraftCheckpoint(version=version, folder=folder, tensors_digest=digest)


@contextmanager
def started(*more: str, **variables: str) -> Iterator[Setting]:
    """On a target whose drafts are accepted as often as one likes; two slots, no prefix cache. `more` are arguments."""
    folder = Path(tempfile.mkdtemp(prefix="updraft-"))  # short enough for a Unix socket
    target = write_cycle_target(folder / "target")
    socket, key_file = folder / "s", folder / "server.yaml"
    admin_key.write(key_file)
    server = Server(
        target,
        folder / "server.log",
        arguments=[
            *sglang_arguments.speculation(
                initial_draft.write(target, folder / "seed", ShapeChoice(draft_vocab_size=DRAFT_VOCAB)), NUM_STEPS
            ),
            *("--config", str(key_file), "--max-running-requests", str(NUM_SLOTS), "--disable-radix-cache"),
            *("--context-length", str(CONTEXT + 6)),
            *more,
        ],
        plugins=[plugin_folder.write(folder / "plugin")],
        variables={program.SGLANG.socket_variable: str(socket), "UPDRAFT_SGLANG_TOP_K": "8", **variables},
    )
    with server:
        yield Setting(server=server, folder=folder, socket=socket, admin=admin_key.read(key_file))
    shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def attached(
    setting: Setting, heard: list[FinishedRequest], server: SglangServer | None = None, **more: Any
) -> AsyncIterator[SglangEngine]:
    """An engine over it for the length of the block; `more` are options."""
    async with AsyncExitStack() as stack:
        if server is None:
            server = await stack.enter_async_context(SglangServer(setting.server.url, admin_key=setting.admin))
        yield await stack.enter_async_context(opened(setting.options(**more), server, heard.append))
