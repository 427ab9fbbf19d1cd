"""A stock server with Updraft's plugin on the cycle target, started as Updraft starts it."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.sglang.models import cycle_draft, write_cycle_target
from tests.sglang.server import Server
from tests.support.tiny_target import DRAFT_VOCAB, save_draft

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_inference.engine import DraftCheckpoint
from updraft_inference.launch import admin_key, sglang_arguments
from updraft_inference.sidecar.sglang.server import SglangServer
from updraft_inference.tap import initial_draft, plugin_folder
from updraft_inference.tap.server_kind import SGLANG

NUM_STEPS = 2


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
    def seed(self) -> Path:
        return self.folder / "seed"

    def client(self) -> SglangServer:
        """One that may change weights."""
        return SglangServer(self.server.url, admin_key=self.admin)

    def saved(self, version: int, quality: float) -> DraftCheckpoint:
        """A draft of which this share of proposals is right."""
        folder = self.folder / "drafts" / str(version)
        digest = save_draft(cycle_draft(self.target, quality=quality), folder)
        return DraftCheckpoint(version=version, folder=folder, tensors_digest=digest)

    def said(self, prompt: str, num_tokens: int) -> str:
        """The greedy text after a prompt."""
        sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        return str(self.server.post("/generate", text=prompt, sampling_params=sampling)["text"])


@contextmanager
def started(*more: str, **variables: str) -> Iterator[Setting]:
    """On a target whose drafts are accepted as often as one likes; no prefix cache. `more` are arguments."""
    folder = Path(tempfile.mkdtemp(prefix="updraft-"))  # short enough for a Unix socket
    target = write_cycle_target(folder / "target")
    socket, key_file = folder / "s", folder / "server.yaml"
    admin_key.write(key_file)
    seed = initial_draft.write(target, folder / "seed", ShapeChoice(draft_vocab_size=DRAFT_VOCAB))
    server = Server(
        target,
        folder / "server.log",
        arguments=[
            *sglang_arguments.speculation(seed, NUM_STEPS),
            *("--config", str(key_file), "--disable-radix-cache"),
            *more,
        ],
        plugins=[plugin_folder.write(folder / "plugin")],
        variables={
            SGLANG.socket_variable: str(socket),
            "UPDRAFT_SGLANG_TOP_K": "8",
            "UPDRAFT_SGLANG_DRAFTING": "auto",
            **variables,
        },
    )
    with server:
        yield Setting(server=server, folder=folder, socket=socket, admin=admin_key.read(key_file))
    shutil.rmtree(folder, ignore_errors=True)
