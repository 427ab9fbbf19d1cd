"""The draft of an SGLang server. With one rank, the plugin swaps it, as with vLLM.

Several tensor-parallel ranks have to swap their drafts at the same step, because ranks with different vocabularies would verify
different tokens. So the server's own weight update swaps them, through its HTTP port. The hello of such a server names
the draft that it loaded last. The agent relies on it only when the checksums of all ranks agree.
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
from updraft_inference.sidecar.attached import AttachedServer, Known
from updraft_inference.sidecar.hello import Hello
from updraft_inference.sidecar.link import Link
from updraft_inference.sidecar.sglang.draft_swap import ServedDraft
from updraft_inference.sidecar.sglang.requirements import check_model, check_server
from updraft_inference.sidecar.sglang.server import SglangServer
from updraft_tap.weights import UNKNOWN

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
"""Time between two attempts to reach a server. Its port opens after its plugin has connected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """`model` is the target's folder. `drafts` has versions, among which a draft that the server already holds is looked up."""

    model: Path
    drafts: Path
    note: Path
    """A file that exists during a swap; see `ServedDraft.open`."""


class AttachedSglang(AttachedServer):
    def __init__(
        self, link: Link, known: Known, server: SglangServer, folders: Folders, *, on_change: Callable[[], None]
    ) -> None:
        super().__init__(link, known, on_change=on_change)
        self._server = server
        self._folders = folders
        self._process, self._has_ranks = "", False
        """The id of the process of the last hello, and whether there are several ranks."""
        self._is_new = asyncio.Event()
        """Set when the drafts of the ranks are not known."""
        self._draft: ServedDraft | None = None
        """The draft of several ranks; None while it is not known."""
        self._problem = ""
        """Why their draft cannot be swapped until the server restarts."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self._server, asyncio.TaskGroup() as tasks:
            proving = tasks.create_task(self._prove())
            try:
                yield
            finally:
                proving.cancel()

    async def _exchange(self, draft: DraftCheckpoint | None) -> SwapResult:
        """Runs to its end even if the caller is cancelled, because several ranks are paused in between."""
        if not self._has_ranks:
            return await super()._exchange(draft)
        return await run_to_its_end(self._swap_ranks(draft))

    async def rehash(self) -> LoadedDraft:
        async with self._swapping:
            if self._draft is not None:
                self.loaded = await self._draft.rehash()
            return self.loaded

    def _meet(self, hello: Hello) -> None:
        says = LoadedDraft(version=hello.version, tensors_digest=hello.digest)
        is_known = self._draft is not None and self._process == hello.id and says == self.loaded
        self._process, self._has_ranks = hello.id, hello.ranks.get("tensor", 1) > 1
        if not is_known:
            self._draft, self._problem = None, ""
            if self._has_ranks:
                self._is_new.set()
        super()._meet(hello)

    def _held(self, hello: Hello) -> LoadedDraft:
        if not self._has_ranks:
            return super()._held(hello)
        return (
            self._draft.loaded
            if self._draft is not None
            else LoadedDraft(version=hello.version, tensors_digest=UNKNOWN)
        )

    async def _prove(self) -> None:
        """Find out which draft a server holds whenever its plugin has connected, until cancelled."""
        if self._folders.note.exists():  # an agent died during a swap, and the server has to resume
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
        """Find out which draft the ranks hold. Raises InvalidInput or Forbidden if it cannot be swapped; another UpdraftError,
        or OSError, if it cannot be found out now."""
        if not self._server.url:
            raise InvalidInput(
                "the SGLang server has several ranks, whose drafts are swapped by requests to it: start the agent with"
                " --attach URL"
            )
        async with self._swapping:
            info = await self._server.info()
            check_server(info)
            await asyncio.to_thread(check_model, info, self._folders.model, self.info.target_fingerprint)
            draft = await ServedDraft.open(self._server, info, self._folders.note)
            hello = self._worker
            if hello is None or not self._has_ranks:
                return
            says = LoadedDraft(version=hello.version, tensors_digest=hello.digest)
            await draft.adopt(says, self._folders.drafts)
            if self._is_new.is_set():  # another server, or the same with another draft
                return
            self._draft, self._problem, self.loaded = draft, "", draft.loaded
        logger.info("The server's draft is known", extra={"version": self.loaded.version})
        self._on_change()

    async def _swap_ranks(self, draft: DraftCheckpoint | None) -> SwapResult:
        async with self._swapping:
            if self._draft is None:
                raise Unavailable(self._problem or f"the drafts of the ranks at {self._server.url} are not known yet")
            try:
                return await self._draft.swap(draft)
            finally:
                self.loaded = self._draft.loaded
