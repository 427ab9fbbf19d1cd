"""The draft that an SGLang server serves: swaps it between two steps, proves it, and undoes what failed.

First every rank reads, checks and prepares its part of the draft while the server works; if one refuses, nothing changes. Then
a swap pauses the server in place, opens an update session for the draft, lets the plugin's loader copy, and resumes. The proof
comes afterwards, because hashing takes longer than loading. The server is never left paused, nor our session open: `swap` runs
to its end even if the caller is cancelled (see `attached`). A pause by someone else is not touched. A session of someone else
is not either, unless one of ours may have been left open.
"""

import asyncio
import json
import logging
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch

from updraft_chassis.errors import Conflict, Corrupt, Forbidden, InvalidInput, Unavailable, UpdraftError
from updraft_inference.engine import DraftCheckpoint, LoadedDraft, SwapResult, TargetChangedError
from updraft_inference.sidecar.sglang import checksums
from updraft_inference.sidecar.sglang.draft_fingerprint import (
    INITIAL_VERSION,
    DraftFingerprint,
    read_draft,
    read_initial_draft,
)
from updraft_inference.sidecar.sglang.server import RankChecksums, ServerInfo, SglangServer
from updraft_sglang.weights import LOADER, PAYLOAD
from updraft_tap.weights import AS_BEFORE, NOT_AS_BEFORE

logger = logging.getLogger(__name__)

_RESUMED = "resumed"
"""Content of the note when the pause is over but the session may still be open."""
_RESUMES = 5
_RESUME_WAIT_S = 1.0
_PREPARED_S = 120.0
"""How long the ranks may take to read a draft from disk."""
_ASK_AGAIN_S = 0.1


class ServedDraft:
    """Callers must swap one at a time."""

    def __init__(self, server: SglangServer, initial: DraftFingerprint, note: Path) -> None:
        self._server = server
        self._initial = initial
        self._note = note
        self._good = initial
        """The last draft that was proved, or the one that the server started with."""
        self.loaded = _loaded(initial)
        """The served draft, by the server's own checksums."""
        self._may_have_session = False
        """A session of ours may still be open at the server."""
        self._target = ""
        """The last known digest of what the draft shares with the target."""

    @classmethod
    async def open(cls, server: SglangServer, info: ServerInfo, note: Path) -> Self:
        """Read the draft that the server started with. Raises InvalidInput if it is not supported or if checksums cannot prove
        a swap, Forbidden without the admin key.

        The file `note` exists during a swap. If it is left over, an agent died during a swap, and its pause is ended.
        Its folder is created if needed; InvalidInput if that fails.
        """
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"cannot write {note} ({error.strerror}); set UPDRAFT_INFERENCE_DATA_DIR") from error
        initial = await asyncio.to_thread(read_initial_draft, Path(info.draft_path), info)
        served_draft = cls(server, initial, note)
        if served_draft.was_cut_off:
            logger.warning("A previous agent ended during a swap; resuming the server")
            await served_draft._finish_interrupted_swap()
        served = await server.checksums()
        if not checksums.shows_vocabulary(served):
            raise InvalidInput(
                f"the checksums of SGLang {info.version} do not cover the draft's vocabulary, so no swap could be proved; use a"
                " release that Updraft was tested with"
            )
        served_draft._target = checksums.target(served)
        return served_draft

    @property
    def was_cut_off(self) -> bool:
        return self._note.exists()

    @property
    def start_folder(self) -> Path:
        return self._initial.draft.folder

    @property
    def good(self) -> DraftCheckpoint | None:
        """The last draft that was proved; None for the one that the server started with."""
        return None if self._good.draft.version == INITIAL_VERSION else self._good.draft

    async def adopt(self, reported: LoadedDraft, drafts: Path | None) -> None:
        """Keep the draft that the server reports if checksums prove it; else load the initial one."""
        served = await self._server.checksums()
        if reported.version and drafts is not None:
            draft = DraftCheckpoint(
                version=reported.version, folder=drafts / str(reported.version), tensors_digest=reported.tensors_digest
            )
            try:
                fingerprint = await self._read(draft)
            except (UpdraftError, OSError) as error:
                logger.info("The server's draft is unknown", extra={"reason": str(error)})
            else:
                if not await _difference(fingerprint, served):
                    self._good, self.loaded = fingerprint, _loaded(fingerprint)
                    logger.info("The server already holds a draft", extra={"version": draft.version})
                    return
        if reported.version or await _difference(self._initial, served):
            try:
                await self._change(self._initial)
            except _HinderedError as error:
                logger.warning("The served draft is not known yet", extra={"reason": str(error)})
                self.loaded = _unproved(self._initial)

    async def swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        """See the port. Raises Unavailable for failures of the server, which say nothing about the draft, including a
        loader that refuses a folder that is valid here."""
        fingerprint = self._initial if draft is None else await self._read(draft)
        try:
            pause_s = await self._change(fingerprint)
        except _NotLoadedError:
            if draft is not None and draft.folder.exists():  # a missing one is downloaded again
                await self._read(draft)  # it may have been damaged meanwhile
            raise
        return SwapResult(loaded=self.loaded, pause_s=pause_s, target=self._target)

    async def _read(self, draft: DraftCheckpoint) -> DraftFingerprint:
        return await asyncio.to_thread(read_draft, draft, self._initial)

    async def rehash(self) -> LoadedDraft:
        served = await self._server.checksums()
        self._target = checksums.target(served)
        return await self._identify(served)

    async def _identify(self, served: list[RankChecksums]) -> LoadedDraft:
        if await _difference(self._good, served):
            self.loaded = replace(_loaded(self._good), tensors_digest=checksums.summary(served))
        else:
            self.loaded = _loaded(self._good)
        return self.loaded

    async def _change(self, fingerprint: DraftFingerprint) -> float:
        """Serve `fingerprint` and prove it. On an error, restore the previous draft."""
        if self.was_cut_off:  # the server did not resume after the previous swap
            await self._finish_interrupted_swap()
        await self._check_free()
        try:
            order = await self._prepare(fingerprint)
        except (Conflict, Forbidden) as error:
            raise _NotLoadedError(str(error)) from error
        await self._check_free()  # again, because preparing takes a while
        is_touched = False
        try:
            pause_s = await self._load(fingerprint, order)
            is_touched = True
            await self._prove(fingerprint)
        except _NotBegun as error:
            raise Unavailable(f"another weight update is in progress at the SGLang server: {error}") from error
        except UpdraftError as error:
            await self._undo(fingerprint, is_touched=is_touched)
            if isinstance(error, TargetChangedError):
                raise TargetChangedError(f"{error}; {await self._target_now()}") from error
            if isinstance(error, Conflict | Forbidden):
                raise _NotLoadedError(str(error)) from error
            raise
        self._good, self.loaded = fingerprint, _loaded(fingerprint)
        return pause_s

    async def _check_free(self) -> None:
        """Raises _HinderedError if weights cannot be changed now: a pause by someone else must not be ended by ours."""
        if reason := await self._server.why_unhealthy():
            raise _HinderedError(f"the SGLang server {reason}; the draft is swapped when it resumes")

    async def _prove(self, fingerprint: DraftFingerprint) -> None:
        """Raises Corrupt if the server holds another draft, or has another embedding than before."""
        served, version = await self._server.checksums(), fingerprint.draft.version
        if difference := await _difference(fingerprint, served):
            raise Corrupt(f"after loading version {version} the server holds something else: {difference}")
        if checksums.target(served) != self._target:
            raise TargetChangedError(f"loading version {version} changed the target's embedding")

    async def _undo(self, failed: DraftFingerprint, *, is_touched: bool) -> None:
        """Serve the last good draft again unless it is still being served, and update `loaded`."""
        try:
            if not is_touched and not await _difference(self._good, await self._server.checksums()):
                return
            order = await self._prepare(self._good)
            await self._check_free()
            await self._load(self._good, order)
            await self._identify(await self._server.checksums())
        except UpdraftError as error:
            extra = {"failed": failed.draft.version, "wanted": self._good.draft.version, "reason": str(error)}
            logger.error(
                "The previous draft cannot be restored; acceptance may drop, "
                "and answers may be wrong if ranks draft with different drafts",
                extra=extra,
            )
            self.loaded = _unproved(self._good)

    async def _target_now(self) -> str:
        """Whether the target is as before again."""
        with suppress(UpdraftError):
            if checksums.target(await self._server.checksums()) == self._target:
                return AS_BEFORE
        return NOT_AS_BEFORE

    async def _prepare(self, fingerprint: DraftFingerprint) -> str:
        """Let all ranks prepare it, and return the order. Raises Conflict if one refuses: nothing has changed."""
        draft, late = fingerprint.draft, ""
        order = json.dumps(
            {"folder": str(draft.folder.resolve()), "version": draft.version, "digest": draft.tensors_digest}
        )
        try:
            async with asyncio.timeout(_PREPARED_S):
                late = await self._server.prepare(order)
                while late:
                    await asyncio.sleep(_ASK_AGAIN_S)
                    late = await self._server.prepare(order)
        except TimeoutError as error:  # they go on, and are ready sooner when they are asked again
            reason = late or "the server did not answer"
            raise Unavailable(f"version {draft.version} is not prepared after {_PREPARED_S:.0f} s: {reason}") from error
        return order

    async def _load(self, fingerprint: DraftFingerprint, order: str) -> float:
        """Let the ranks copy what they have prepared. Seconds between the pause request and the resumption, an upper bound on
        the actual pause because a step may have continued."""
        started = time.perf_counter()
        self._note.write_text("")
        try:
            await self._server.pause()
            await self._update(fingerprint, order)
        finally:
            await self._resume()
        return time.perf_counter() - started

    async def _update(self, fingerprint: DraftFingerprint, order: str) -> None:
        await self._begin_session()
        try:
            await self._server.update(
                [(PAYLOAD, torch.tensor(list(order.encode()), dtype=torch.uint8))],
                load_format=LOADER,
                label=f"v{fingerprint.draft.version}",
                tp_size=fingerprint.info.tp_size,
            )
        except BaseException:
            with suppress(UpdraftError):  # the first error says more, and the next swap ends a left-over session
                await self._end_session()
            raise
        await self._end_session()

    async def _begin_session(self) -> None:
        if self._may_have_session:
            await self._end_left_session()
        try:
            await self._server.begin_update()
        except Conflict as error:
            raise _NotBegun(str(error)) from error
        except Unavailable:
            self._may_have_session = True  # the answer may have been lost
            with suppress(UpdraftError):
                await self._end_session()
            raise
        self._may_have_session = True

    async def _end_session(self) -> None:
        await self._server.end_update()
        self._may_have_session = False

    async def _end_left_session(self) -> None:
        with suppress(Conflict):  # no session is open
            await self._server.end_update()
        self._may_have_session = False

    async def _finish_interrupted_swap(self) -> None:
        """End the session and the pause of an interrupted swap. A session without a pause is left to the next swap,
        because to end it the server waits for all running requests."""
        self._may_have_session = True
        if self._note.read_text() != _RESUMED:
            await self._end_left_session()
            await self._resume()

    async def _resume(self) -> None:
        for left in reversed(range(_RESUMES)):
            try:
                await self._server.resume()
            except UpdraftError as error:
                if not left:
                    raise
                logger.warning("The server does not resume yet", extra={"reason": str(error)})
                await asyncio.sleep(_RESUME_WAIT_S)
            else:
                if self._may_have_session:  # the next swap or agent ends it
                    self._note.write_text(_RESUMED)
                else:
                    self._note.unlink(missing_ok=True)
                return


class _NotBegun(Conflict):
    """Someone else has an open session."""


class _NotLoadedError(Unavailable):
    """The server or its loader refused."""


class _HinderedError(Unavailable):
    """The server cannot change weights now."""


async def _difference(fingerprint: DraftFingerprint, served: list[RankChecksums]) -> str:
    return await asyncio.to_thread(fingerprint.difference, served)


def _loaded(fingerprint: DraftFingerprint) -> LoadedDraft:
    return LoadedDraft(version=fingerprint.draft.version, tensors_digest=fingerprint.draft.tensors_digest)


def _unproved(fingerprint: DraftFingerprint) -> LoadedDraft:
    return replace(_loaded(fingerprint), tensors_digest="sha256:unproved")
