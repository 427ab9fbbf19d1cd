"""The server beside the agent, as the holder of a draft: which draft it holds, and how to swap it.

After each swap, the server reports a digest of the draft that it holds. It must equal the digest of the verified file.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from pydantic import BaseModel, ValidationError, model_validator

from updraft_artifacts.digests import tensors_digest
from updraft_chassis.errors import Corrupt, InvalidInput, Unavailable, UpdraftError
from updraft_draft import checkpoint
from updraft_inference.engine import (
    CaptureLoss,
    DraftCheckpoint,
    EngineLoad,
    HolderInfo,
    LoadedDraft,
    OtherShapeError,
    SwapResult,
    TargetChangedError,
)
from updraft_inference.sidecar.hello import Hello, Line, Role, Uint32, problems
from updraft_inference.sidecar.link import Answer, Gone, Link, Measured
from updraft_tap import weights, wire
from updraft_tap.drafting.speedup import Speedup

Restart = Callable[[Path], Awaitable[Path]]
"""Restarts the server with the draft in a folder; returns where that draft is kept."""

_QUANTIZATION_CHARS = 64

_RETURN_S = 300.0
"""How long the plugin of a server that was restarted may take to connect after the server is up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """A draft to load, and the digest of what a server then holds; "" if only the server can read the folder."""

    folder: Path
    version: int
    digest: str
    held: str


class _Served(BaseModel, frozen=True):
    """The draft that a server holds."""

    version: Uint32
    digest: Line


class _Loaded(BaseModel, frozen=True):
    """The answer to a load; see `updraft_tap.wire`. A server that cannot swap at all sends only a refusal."""

    refusal: Line
    needs_restart: bool = False
    target_changed: bool = False
    held: Line = ""
    target: Line = ""
    pause_us: Uint32 = 0
    served: _Served | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.refusal and self.served is None:
            raise ValueError("it does not say which draft is served")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Facts about a server before it connects: the fingerprints of its target and tokenizer, how the target's weights are
    quantized, and the folder of its initial draft."""

    fingerprints: tuple[str, str]
    quantization: str = ""
    initial: Path | None = None


class AttachedServer:
    """Everything happens on the agent's event loop. `on_change` is called when the server holds another draft by itself."""

    load = EngineLoad()
    faults: Mapping[int, int] = MappingProxyType({})

    def __init__(self, link: Link, known: Known, *, on_change: Callable[[], None]) -> None:
        self._link = link
        self._initial = known.initial
        self._on_change = on_change
        self._worker: Hello | None = None
        self._roles: set[Role] = set()
        """The roles of the processes that are connected."""
        self._asked: tuple[Role | None, int] = None, 0
        """The role of the process that was asked to load, and the version; it waits for `_answer`."""
        self._answer: asyncio.Future[Mapping[str, Any]] | None = None
        self._swapping = asyncio.Lock()
        self._measured = Measured(version=0, speedups={})
        """The speedups that the server measured last."""
        self._misfits: dict[DraftCheckpoint | None, str] = {}
        """Drafts of another shape, and why. They are not sent again until the server's next hello."""
        self.restart: Restart | None = None
        """Restarts the server with another draft; None if someone else starts it."""
        self._returned = asyncio.Event()
        """Set by a hello when the process with the model and the one that takes loads are both connected."""
        self._failed_starts: Counter[str] = Counter()
        self.loaded = LoadedDraft()
        self.met = asyncio.Event()
        """Set once the process with the model and the one that takes loads are connected."""
        target, tokenizer = known.fingerprints
        self.info = HolderInfo(
            engine=link.kind.engine.lower(),
            target_fingerprint=target,
            tokenizer_fingerprint=tokenizer,
            quantization=known.quantization,
        )

    @property
    def device(self) -> str:
        return self._worker.device if self._worker is not None else ""

    @property
    def capture_problem(self) -> str:
        return self._link.problem

    @property
    def capture_losses(self) -> Mapping[CaptureLoss, int]:
        return self._link.losses

    @property
    def speedups(self) -> Mapping[int, Speedup]:
        return self._measured.speedups if self._measured.version == self.loaded.version else {}

    def compare(self, *, is_comparing: bool) -> None:
        """A server mixes no proposers, so every step shows the draft alone."""

    def hear(self, event: Hello | Gone | Answer | Measured) -> None:
        """Take an event of the link."""
        if isinstance(event, Answer):
            is_asked = event.header.get("version") in (self._asked[1], None)  # else it is to an earlier load
            if is_asked and self._answer is not None and not self._answer.done():
                self._answer.set_result(event.header)
        elif isinstance(event, Measured):
            self._measured = event
        elif isinstance(event, Gone):
            self._lose(event.role)
        else:
            self._roles.add(event.role)
            if event.role == "worker":
                self._meet(event)
            elif self._worker is not None and self._worker.loader == event.role:
                self._tell()  # what could not be loaded before can be now

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run background work of subclasses for the duration of the block."""
        yield

    async def swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        """See the port; None: the draft that the server started with. Raises Unavailable if the server is away or refuses,
        which is no fault of the draft; OtherShapeError if someone has to restart the server with it."""
        try:
            return await self._exchange(draft)
        except OtherShapeError:
            if self.restart is None or draft is None:
                raise
            return await self._restart_with(self.restart, draft)

    async def _exchange(self, draft: DraftCheckpoint | None) -> SwapResult:
        """Swap without a restart."""
        async with self._swapping:
            worker = self._worker
            if worker is None or worker.loader not in self._roles:
                raise Unavailable(f"the {self._link.kind.engine} server is not connected")
            if draft is None and self.loaded == LoadedDraft():
                return SwapResult(loaded=self.loaded, pause_s=0.0)
            if draft in self._misfits:
                raise OtherShapeError(self._misfits[draft])
            load = self._first_draft() if draft is None else await asyncio.to_thread(_read, draft, worker.dtype)
            try:
                return await self._swap(load, worker.loader)
            except OtherShapeError as error:
                if draft is not None:
                    self._misfits[draft] = str(error)
                raise

    async def _restart_with(self, restart: Restart, draft: DraftCheckpoint) -> SwapResult:
        """Restart the server for a draft of another shape, and prove that it serves this draft.

        Raises Unavailable the first time that the server fails to start with it, InvalidInput the second time.
        """
        started_s = time.monotonic()
        self._returned.clear()
        try:
            self._initial = await restart(draft.folder)
        except UpdraftError as error:
            self._failed_starts[draft.tensors_digest] += 1
            is_second = self._failed_starts[draft.tensors_digest] > 1
            message = f"the {self._link.kind.engine} server does not start with version {draft.version}: {error}"
            raise (InvalidInput if is_second else Unavailable)(message) from error
        try:
            async with asyncio.timeout(_RETURN_S):
                await self._returned.wait()
        except TimeoutError:
            raise Unavailable(f"the plugin of the restarted {self._link.kind.engine} server did not connect") from None
        result = await self._exchange(draft)
        return replace(result, pause_s=time.monotonic() - started_s)

    async def rehash(self) -> LoadedDraft:
        """The server proves its draft at each swap, and forgets the digest when its weights may have changed."""
        return self.loaded

    def _meet(self, hello: Hello) -> None:
        self._worker = hello
        self._misfits.clear()
        self.loaded = self._held(hello)
        if not self.met.is_set():
            self.info = replace(
                self.info,
                engine=f"{self._link.kind.engine.lower()}/{hello.engine.version}",
                # A server may quantize weights that are not quantized in the files.
                quantization=self.info.quantization or hello.quantization[:_QUANTIZATION_CHARS],
            )
        self._tell()

    def _tell(self) -> None:
        if self._worker is not None and self._worker.loader in self._roles:
            self.met.set()
            self._returned.set()
        self._on_change()

    def _held(self, hello: Hello) -> LoadedDraft:
        """The server's draft according to its hello."""
        return LoadedDraft(version=hello.version, tensors_digest=hello.digest)

    def _lose(self, role: Role) -> None:
        self._roles.discard(role)
        if role == "worker":
            self._worker = None
        else:
            self._measured = Measured(version=0, speedups={})
        if role == self._asked[0] and self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._away())

    async def _swap(self, load: _Load, loader: Role) -> SwapResult:
        try:
            answer = _Loaded.model_validate(await self._ask(load, loader))
        except ValidationError as error:
            raise Unavailable(
                f"the {self._link.kind.engine} server's answer to version {load.version} is malformed: {problems(error)}"
            ) from error
        if answer.served is not None:
            self.loaded = LoadedDraft(version=answer.served.version, tensors_digest=answer.served.digest)
        if answer.refusal:
            refusal = f"the {self._link.kind.engine} server refused version {load.version}: {answer.refusal}"
            if answer.needs_restart:
                raise OtherShapeError(f"{refusal}; restart it with the draft in {load.folder}")
            raise TargetChangedError(refusal) if answer.target_changed else Unavailable(refusal)
        if load.held and answer.held != load.held:
            self.loaded = LoadedDraft(version=load.version, tensors_digest=answer.held)
            raise Corrupt(f"with version {load.version} the server holds {answer.held}, but the file is {load.held}")
        return SwapResult(loaded=self.loaded, pause_s=answer.pause_us / 1e6, target=answer.target)

    async def _ask(self, load: _Load, loader: Role) -> Mapping[str, Any]:
        """Tell the server to load; its answer, however long it takes: until then, it would refuse another load. Raises
        Unavailable if it goes away."""
        if loader not in self._roles:  # since the draft was read
            raise self._away()
        self._asked, self._answer = (loader, load.version), asyncio.get_running_loop().create_future()
        message = {"kind": "load", "folder": str(load.folder), "version": load.version, "digest": load.digest}
        self._link.send(loader, message)
        try:
            return await self._answer
        finally:
            self._answer = None

    def _away(self) -> Unavailable:
        return Unavailable(f"the {self._link.kind.engine} server went away")

    def _first_draft(self) -> _Load:
        if self._initial is None:
            raise Unavailable(
                f"the {self._link.kind.engine} server cannot return to the draft that it started with: set"
                " UPDRAFT_INFERENCE_INITIAL_DRAFT to that draft's folder, or restart the server"
            )
        return _Load(folder=self._initial, version=0, digest="", held="")


def _read(draft: DraftCheckpoint, dtype: str) -> _Load:
    """Verify a draft and compute what a server of this dtype holds of it. Raises Corrupt or InvalidInput."""
    held_dtype = next((one for one, name in wire.NAMES.items() if name == dtype), torch.bfloat16)
    config, tensors = checkpoint.load(draft.folder)
    if config.norm_before_residual:
        raise InvalidInput(f"version {draft.version} has norm_before_residual, which servers are not swapped to")
    digest = tensors_digest(checkpoint.tensor_specs(sorted(tensors.items())))
    if digest != draft.tensors_digest:
        raise Corrupt(f"version {draft.version} has digest {digest}, but its manifest has {draft.tensors_digest}")
    held = weights.digest({**weights.joined(tensors, held_dtype), "d2t": tensors["d2t"]})
    return _Load(folder=draft.folder.resolve(), version=draft.version, digest=digest, held=held)
