"""The server beside which the agent runs, as the holder of a draft: what is the same for each kind of server."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType

from updraft_inference.engine import (
    CaptureLoss,
    DraftCheckpoint,
    EngineLoad,
    HolderInfo,
    LoadedDraft,
    Speedup,
    SwapResult,
)
from updraft_inference.sidecar.hello import Hello
from updraft_inference.sidecar.link import Answer, Gone, Link


class AttachedServer(ABC):
    """Everything happens on the agent's event loop. `on_change` is called when the server holds another draft by itself."""

    load = EngineLoad()
    speedups: Mapping[int, Speedup] = MappingProxyType({})
    faults: Mapping[int, int] = MappingProxyType({})

    def __init__(self, link: Link, *, fingerprints: tuple[str, str], on_change: Callable[[], None]) -> None:
        """`fingerprints` are those of the target and of its tokenizer."""
        self._link = link
        self._on_change = on_change
        self._swapping = asyncio.Lock()
        self.loaded = LoadedDraft()
        self.met = asyncio.Event()
        """Set once the process that has the model was there."""
        target, tokenizer = fingerprints
        self.info = HolderInfo(
            engine=link.kind.engine.lower(), target_fingerprint=target, tokenizer_fingerprint=tokenizer
        )

    @property
    def capture_problem(self) -> str:
        return self._link.problem

    @property
    def capture_losses(self) -> Mapping[CaptureLoss, int]:
        return self._link.losses

    def compare(self, *, is_comparing: bool) -> None:  # noqa: B027 - right for each kind
        """A server mixes no proposers, so every step shows the draft alone."""

    def hear(self, event: Hello | Gone | Answer) -> None:
        """Take an event of the link."""
        if isinstance(event, Hello) and event.role == "worker":
            self._meet(event)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Do what this kind of server needs beside events and swaps for the duration of the block."""
        yield

    @abstractmethod
    async def swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        """See the port; None: the draft that the server started with. Raises Unavailable while the server is away or refuses,
        which says nothing about the draft; OtherShapeError if the server has to restart with it."""

    @abstractmethod
    async def rehash(self) -> LoadedDraft: ...

    @abstractmethod
    def _learn(self, hello: Hello) -> None:
        """Learn what the process that has the model holds."""

    def _meet(self, hello: Hello) -> None:
        self._learn(hello)
        if not self.met.is_set():
            self.info = HolderInfo(
                engine=f"{self.info.engine}/{hello.engine.version}",
                target_fingerprint=self.info.target_fingerprint,
                tokenizer_fingerprint=self.info.tokenizer_fingerprint,
            )
        self.met.set()
        self._on_change()
