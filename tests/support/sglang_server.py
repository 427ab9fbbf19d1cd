"""A small HTTP server that speaks SGLang's routes for weights, for failures that the real one cannot be made to show."""

import asyncio
import base64
import json
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tests.support.ports import free_port
from tests.support.tiny_target import make_draft, save_draft
from tests.support.wait import until

from updraft_chassis.credentials import ServerTls
from updraft_draft import checkpoint
from updraft_inference.engine import DraftCheckpoint
from updraft_inference.sidecar.sglang import checksums
from updraft_inference.sidecar.sglang.server import DRAFT
from updraft_sglang.ranks.preparation import PREPARE, PREPARED, PREPARING
from updraft_sglang.weights import LOADER, PAYLOAD

ADMIN = "the admin key"


@dataclass(slots=True, kw_only=True)
class FakeSglang:
    """Serves `target` with the draft in `seed`. Tests change what it says and does; `calls` are the paths asked for."""

    target: Path
    seed: Path
    info: dict[str, Any] = field(default_factory=dict)
    embedding: str = "the target's"
    """The checksum of the embedding after the next load."""
    refusals: dict[str, list[str]] = field(default_factory=dict)
    """By path, what the next calls are refused with."""
    is_lying: bool = False
    """It says that it loaded a draft, and did not."""
    shows_vocabulary: bool = True
    """Its checksums cover the map from draft to target tokens."""
    preparing: int = 0
    """How many answers say that its ranks are not ready yet."""
    prepared: set[str] = field(default_factory=set)
    """Orders."""
    paused_by_others: int = 0
    """If not 0, someone else pauses it when its ranks are asked for this time."""
    damages: int = 0
    """Loads that leave a wrong weight."""
    is_paused: bool = False
    is_unhealthy: bool = False
    """Its last health check failed: it serves on, and says that it is neither healthy nor ready."""
    has_session: bool = False
    label: str = "default"
    held: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    may_update: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    def __post_init__(self) -> None:
        self.may_update.set()
        self.load(self.seed)

    def load(self, folder: Path) -> None:
        """Hold this draft, as SGLang holds it."""
        import torch

        config, tensors = checkpoint.load(folder)
        self.held = checksums.expected_hashes(config, tensors, dtype=torch.float32, device="cpu", tp=(0, 1))
        self.held[f"{DRAFT}.model.embed_tokens.weight"] = self.embedding
        if not self.shows_vocabulary:
            del self.held[checksums.VOCABULARY]

    async def answer(self, request: Request) -> Response:
        path = request.url.path
        self.calls.append(path)
        if self.refusals.get(path):
            return JSONResponse({"success": False, "message": self.refusals[path].pop(0)}, status_code=400)
        is_admin = path not in {"/ping", "/ready", "/server_info", "/model_info", "/generate"}
        if is_admin and request.headers.get("authorization") != f"Bearer {ADMIN}":
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        body = json.loads(await request.body() or b"{}")
        reply: Response = await getattr(self, path.removeprefix("/"))(body)
        return reply

    async def ping(self, _: dict[str, Any]) -> Response:
        return Response(status_code=503 if self.is_unhealthy else 200)

    async def ready(self, _: dict[str, Any]) -> Response:
        return Response(status_code=503 if self.is_paused or self.is_unhealthy else 200)

    async def server_info(self, _: dict[str, Any]) -> Response:
        said = {
            "version": "0.5.23",
            "device": "cpu",
            "dtype": "float32",
            "tp_size": 1,
            "dp_size": 1,
            "pp_size": 1,
            "speculative_algorithm": "EAGLE3",
            "speculative_draft_model_path": str(self.seed),
            "speculative_eagle_topk": 1,
            "custom_weight_loader": [LOADER],
        }
        return JSONResponse(said | self.info)

    async def model_info(self, _: dict[str, Any]) -> Response:
        return JSONResponse({"model_path": self.info.get("model_path", str(self.target))})

    async def pause_generation(self, _: dict[str, Any]) -> Response:
        self.is_paused = True
        return JSONResponse({"status": "ok"})

    async def continue_generation(self, _: dict[str, Any]) -> Response:
        self.is_paused = False
        return JSONResponse({"status": "ok"})

    async def begin_weight_update(self, _: dict[str, Any]) -> Response:
        if self.has_session:
            return _refused("a weight-update session is already open; call end_weight_update() first")
        self.has_session = True
        return _done()

    async def end_weight_update(self, _: dict[str, Any]) -> Response:
        if not self.has_session:
            return _refused("no weight-update session is open")
        self.has_session = False
        return _done()

    async def update_weights_from_tensor(self, body: dict[str, Any]) -> Response:
        assert self.is_paused
        assert self.has_session
        assert (body["selector"], body["flush_cache"]) == (DRAFT, False)
        await self.may_update.wait()
        named = dict(pickle.loads(base64.b64decode(body["serialized_named_tensors"][0])))  # noqa: S301 - the test's own
        if not self.is_lying:
            order = bytes(named[PAYLOAD].tolist()).decode()
            self.prepared.remove(order)
            self.load(Path(json.loads(order)["folder"]))
        if self.damages:
            self.damages -= 1
            self.held["draft.model.norm.weight"] = "0" * 16
        self.label = body["weight_version"]
        return _done()

    async def weights_checker(self, body: dict[str, Any]) -> Response:
        if body["action"].startswith(PREPARE):
            return self._prepare(body["action"].removeprefix(PREPARE))
        place = {"tp_rank": 0, "tp_size": 1}
        rank = {"checksums": self.held, "per_gpu_checksum": "", "parallelism_info": [place]}
        return JSONResponse({"success": True, "message": "", "ranks": [rank]})

    def _prepare(self, order: str) -> Response:
        self.prepared.add(order)
        if self.paused_by_others:
            self.paused_by_others -= 1
            self.is_paused = not self.paused_by_others
        if self.preparing:
            self.preparing -= 1
            return JSONResponse({"success": True, "message": PREPARING})
        return JSONResponse({"success": True, "message": PREPARED})

    async def generate(self, _: dict[str, Any]) -> Response:
        while self.is_paused:  # noqa: ASYNC110 - a flag that tests set
            await asyncio.sleep(0.01)
        return JSONResponse({"output_ids": [3]})


def _done() -> Response:
    return JSONResponse({"success": True, "message": "Success"})


def _refused(message: str) -> Response:
    return JSONResponse({"success": False, "message": message}, status_code=400)


def saved_draft(models: Path, version: int, **how: Any) -> DraftCheckpoint:
    """A draft for `models`/target in `models`/drafts."""
    folder = models / "drafts" / str(version)
    digest = save_draft(make_draft(models / "target", seed=version, **how), folder)
    return DraftCheckpoint(version=version, folder=folder, tensors_digest=digest)


@asynccontextmanager
async def running(
    fake: FakeSglang, *, host: str = "127.0.0.1", tls: ServerTls | None = None
) -> AsyncIterator[FakeSglang]:
    """It listens for the length of the block."""
    port = free_port()
    app = Starlette(routes=[Route("/{path:path}", fake.answer, methods=["GET", "POST"])])
    config = uvicorn.Config(app, host=host, port=port, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    if tls is not None:
        config.ssl_certfile, config.ssl_keyfile = tls.cert_file, str(tls.key_file)
    server = uvicorn.Server(config)
    fake.url = f"{'http' if tls is None else 'https'}://{host}:{port}"
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        await until(lambda: server.started, what="the server's start")
        try:
            yield fake
        finally:
            server.should_exit = True
