"""The draft of an SGLang server: replaced through the server's own HTTP port, on all its ranks at one step.

The plugin's connection says that a server is there, and which draft it was told to load last. It is believed only when the
server's checksums agree, which takes until the server's port answers. A server that cannot be swapped at all serves on, and its
pod reports why.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from updraft_chassis.errors import Forbidden, InvalidInput, Unavailable, UpdraftError
from updraft_inference.cancellation import run_to_its_end
from updraft_inference.engine import DraftCheckpoint, LoadedDraft, SwapResult
from updraft_inference.sidecar.attached import AttachedServer
from updraft_inference.sidecar.hello import Hello
from updraft_inference.sidecar.link import Link
from updraft_inference.sidecar.sglang.draft_swap import ServedDraft
from updraft_inference.sidecar.sglang.requirements import check_model, check_server
from updraft_inference.sidecar.sglang.server import SglangServer
from updraft_tap.weights import UNKNOWN

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
"""Between two attempts to reach a server, whose port opens after its plugin has connected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """`model` is that of the target. `drafts` has versions, by which a draft that the server already holds is recognised."""

    model: Path
    drafts: Path
    note: Path
    """A file that exists during a swap; see `ServedDraft.open`."""


class AttachedSglang(AttachedServer):
    """Swaps by requests to the server."""

    def __init__(
        self,
        link: Link,
        server: SglangServer,
        *,
        folders: Folders,
        fingerprints: tuple[str, str],
        on_change: Callable[[], None],
    ) -> None:
        super().__init__(link, fingerprints=fingerprints, on_change=on_change)
        self._server = server
        self._folders = folders
        self._hello: Hello | None = None
        self._is_new = asyncio.Event()
        """Set while it is not known what the server of the last hello holds."""
        self._draft: ServedDraft | None = None
        self._problem = ""
        """Why the server's draft cannot be swapped until it restarts."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self._server, asyncio.TaskGroup() as tasks:
            proving = tasks.create_task(self._prove())
            try:
                yield
            finally:
                proving.cancel()

    async def swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        """Runs to its end even if the caller is cancelled, because the server is paused in between."""
        return await run_to_its_end(self._swap(draft))

    async def rehash(self) -> LoadedDraft:
        async with self._swapping:
            if self._draft is not None:
                self.loaded = await self._draft.rehash()
            return self.loaded

    def _learn(self, hello: Hello) -> None:
        before, self._hello = self._hello, hello
        says = LoadedDraft(version=hello.version, tensors_digest=hello.digest)
        is_known = self._draft is not None and before is not None and before.id == hello.id
        if is_known and says == self.loaded:
            return
        self._draft, self._problem = None, ""
        self.loaded = LoadedDraft(version=hello.version, tensors_digest=UNKNOWN)
        self._is_new.set()

    async def _prove(self) -> None:
        """Find out what a server holds whenever its plugin has connected, until cancelled."""
        if self._folders.note.exists():  # an agent died in a swap, and the server has to go on
            self._is_new.set()
        logged = ""
        while True:
            await self._is_new.wait()
            self._is_new.clear()
            try:
                await run_to_its_end(self._open())
                logged = ""
            except (InvalidInput, Forbidden) as error:
                self._problem = str(error)
                logger.error("The server's draft cannot be swapped", extra={"reason": self._problem})
            except (UpdraftError, OSError) as error:
                if str(error) != logged:
                    logger.info("Waiting for the server", extra={"reason": str(error)})
                logged = str(error)
                await asyncio.sleep(_RETRY_S)
                self._is_new.set()

    async def _open(self) -> None:
        """Find out what the server of the last hello holds. Raises InvalidInput or Forbidden if its draft cannot be swapped;
        any other UpdraftError, and OSError, if that cannot be found out now."""
        async with self._swapping:
            info = await self._server.info()
            check_server(info)
            await asyncio.to_thread(check_model, info, self._folders.model, self.info.target_fingerprint)
            draft = await ServedDraft.open(self._server, info, self._folders.note)
            if self._hello is None:
                return
            says = LoadedDraft(version=self._hello.version, tensors_digest=self._hello.digest)
            await draft.adopt(says, self._folders.drafts)
            if self._is_new.is_set():  # another server, or the same with another draft
                return
            self._draft, self._problem, self.loaded = draft, "", draft.loaded
        logger.info("The server's draft is known", extra={"version": self.loaded.version})
        self._on_change()

    async def _swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        async with self._swapping:
            if self._draft is None:
                raise Unavailable(self._problem or f"the SGLang server at {self._server.url} is not up yet")
            try:
                return await self._draft.swap(draft)
            finally:
                self.loaded = self._draft.loaded
