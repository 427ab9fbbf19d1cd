"""Which draft the server serves: change it between two steps, prove it, undo what failed.

A swap pauses the server in place, opens a session for the draft, lets the plugin's loader read the folder, and goes on; the
proof comes after, for hashing takes longer than loading. The server is never left paused, nor a session of ours open:
whatever happens to the caller, `swap` runs to its end (see `engine`). Somebody else's pause is not touched, nor a session,
unless one of ours may have been left.
"""

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch

from updraft_chassis.errors import Conflict, Corrupt, Forbidden, InvalidInput, Unavailable, UpdraftError
from updraft_inference.engine import DraftCheckpoint, LoadedDraft, SwapResult
from updraft_inference.sglang_engine import checksums
from updraft_inference.sglang_engine.draft_fingerprint import (
    INITIAL_VERSION,
    DraftFingerprint,
    Vocabulary,
    read_draft,
    read_initial_draft,
)
from updraft_inference.sglang_engine.server import Named, RankChecksums, ServerInfo, SglangServer
from updraft_inference.sglang_engine.server_stats import label

logger = logging.getLogger(__name__)

LOADER = "updraft_sglang.weights.load"
"""By this name SGLang finds the plugin's loader, if it was started with it as a custom weight loader."""

_RESUMED = "resumed"
"""In the note of a swap whose pause is over, and whose session may not be."""
_RESUMES = 5
_RESUME_WAIT_S = 1.0


class ServedDraft:
    """Swaps one at a time; callers see to that."""

    def __init__(
        self, server: SglangServer, info: ServerInfo, vocabulary: Vocabulary, seed: DraftFingerprint, note: Path
    ) -> None:
        self._server = server
        self._info = info
        self._vocabulary = vocabulary
        self._seed = seed
        self._note = note
        self._good = seed
        """What was proved last, or what the server started with."""
        self._loaded = _loaded(seed)
        self._may_have_session = False
        """A session of ours may be open at the server."""

    @classmethod
    async def open(cls, server: SglangServer, info: ServerInfo, note: Path) -> Self:
        """Read the seed that the server started with. InvalidInput if it cannot be used, Forbidden without the admin key.

        `note` is a file that exists during a swap: where it is left, an agent died in one, and its pause is ended. Its folder
        may not exist yet; InvalidInput if it cannot be made.
        """
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"cannot write {note} ({error.strerror}); set UPDRAFT_INFERENCE_DATA_DIR") from error
        vocabulary, seed = await asyncio.to_thread(read_initial_draft, Path(info.draft_path), info)
        served_draft = cls(server, info, vocabulary, seed, note)
        if served_draft.was_cut_off:
            logger.warning("An agent before this one ended within a swap; the server goes on")
            await served_draft._go_on()
        await server.checksums()
        return served_draft

    @property
    def was_cut_off(self) -> bool:
        """A swap began and did not end."""
        return self._note.exists()

    @property
    def start_folder(self) -> Path:
        """The draft that the server started with."""
        return self._seed.folder

    @property
    def good(self) -> DraftCheckpoint | None:
        """What was proved last; None for the draft that the server started with."""
        fingerprint = self._good
        if fingerprint.version == INITIAL_VERSION:
            return None
        return DraftCheckpoint(
            version=fingerprint.version, folder=fingerprint.folder, tensors_digest=fingerprint.tensors_digest
        )

    @property
    def loaded(self) -> LoadedDraft:
        """What serves, by the server's own hashes."""
        return self._loaded

    async def adopt(self, said: LoadedDraft, drafts: Path | None) -> None:
        """Begin with what the server holds, if it is what it says and we can prove it; else with the seed."""
        served = await self._server.checksums()
        if said.version and drafts is not None:
            draft = DraftCheckpoint(
                version=said.version, folder=drafts / str(said.version), tensors_digest=said.tensors_digest
            )
            try:
                fingerprint = await asyncio.to_thread(read_draft, draft, self._vocabulary, self._info)
            except (UpdraftError, OSError) as error:
                logger.info("The server's draft is not known here", extra={"reason": str(error)})
            else:
                if not await _difference(fingerprint, served):
                    self._good, self._loaded = fingerprint, _loaded(fingerprint)
                    logger.info("The server holds a draft already", extra={"version": fingerprint.version})
                    return
        if said.version or await _difference(self._seed, served):
            try:
                await self._change(self._seed)
            except _HinderedError as error:
                logger.warning("Which draft the server holds is not known yet", extra={"reason": str(error)})
                self._loaded = _unproved(self._seed)

    async def swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        """See the port. Unavailable for troubles of the server, which say nothing about the draft: also where the loader in it
        refuses a folder that is sound and fits as it is read here.
        """
        fingerprint = self._seed if draft is None else await self._read(draft)
        try:
            pause_s = await self._change(fingerprint)
        except _NotLoadedError:
            if draft is not None and draft.folder.exists():  # one that is gone is fetched anew
                await self._read(draft)  # it may have become unsound meanwhile
            raise
        return SwapResult(loaded=self._loaded, pause_s=pause_s)

    async def _read(self, draft: DraftCheckpoint) -> DraftFingerprint:
        return await asyncio.to_thread(read_draft, draft, self._vocabulary, self._info)

    async def rehash(self) -> LoadedDraft:
        """Hash again what is served."""
        served = await self._server.checksums()
        if await _difference(self._good, served):
            self._loaded = replace(_loaded(self._good), tensors_digest=checksums.summary(served))
        else:
            self._loaded = _loaded(self._good)
        return self._loaded

    async def _change(self, fingerprint: DraftFingerprint) -> float:
        """Serve `fingerprint`, proved; else what served before, and the error."""
        if self.was_cut_off:  # the server did not go on when the swap before asked it to
            await self._go_on()
        reason = await self._server.why_unhealthy()
        if reason:
            raise _HinderedError(f"the SGLang server {reason}; the draft is changed when it goes on")
        is_touched = False
        try:
            pause_s = await self._load(fingerprint)
            is_touched = True
            difference = await _difference(fingerprint, await self._server.checksums())
            if difference:
                raise Corrupt(f"after loading version {fingerprint.version} the server does not hold it: {difference}")
        except _NotBegun as error:
            raise Unavailable(f"another update of weights is under way at the SGLang server: {error}") from error
        except UpdraftError as error:
            await self._undo(fingerprint, is_touched=is_touched)
            if isinstance(error, Conflict | Forbidden):
                raise _NotLoadedError(str(error)) from error
            raise
        self._good, self._loaded = fingerprint, _loaded(fingerprint)
        return pause_s

    async def _undo(self, failed: DraftFingerprint, *, is_touched: bool) -> None:
        """Serve the last good draft again, unless it never stopped to serve. `loaded` says what is found."""
        try:
            if not is_touched and not await _difference(self._good, await self._server.checksums()):
                return
            await self._load(self._good)
            await self.rehash()
        except UpdraftError as error:
            extra = {"failed": failed.version, "wanted": self._good.version, "reason": str(error)}
            logger.error("The draft before cannot be loaded again; output stays exact, drafts may be poor", extra=extra)
            self._loaded = _unproved(self._good)

    async def _load(self, fingerprint: DraftFingerprint) -> float:
        """Seconds from the wish to pause to going on: no less than the server stood still, for a step may have run on."""
        started = time.perf_counter()
        self._note.write_text("")
        try:
            await self._server.pause()
            await self._update(fingerprint)
        finally:
            await self._resume()
        return time.perf_counter() - started

    async def _update(self, fingerprint: DraftFingerprint) -> None:
        await self._begin_session()
        try:
            await self._server.update(
                _named(fingerprint), load_format=LOADER, label=label(fingerprint.version), tp_size=self._info.tp_size
            )
        except BaseException:
            with suppress(
                UpdraftError
            ):  # what failed first says more, and the next swap ends what is left of the session
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
        with suppress(Conflict):  # there is none
            await self._server.end_update()
        self._may_have_session = False

    async def _go_on(self) -> None:
        """End the session and the pause of a swap that did not. A session without a pause is ended within the next one: to end
        it, the server waits for all that runs."""
        self._may_have_session = True
        if self._note.read_text() != _RESUMED:
            await self._end_left_session()
            await self._resume()

    async def _resume(self) -> None:
        """A server that stays paused serves nobody, so this alone is tried again."""
        for left in reversed(range(_RESUMES)):
            try:
                await self._server.resume()
            except UpdraftError as error:
                if not left:
                    raise
                logger.warning("The server does not go on yet", extra={"reason": str(error)})
                await asyncio.sleep(_RESUME_WAIT_S)
            else:
                if self._may_have_session:  # which the next swap, or the next agent, ends
                    self._note.write_text(_RESUMED)
                else:
                    self._note.unlink(missing_ok=True)
                return


class _NotBegun(Conflict):
    """A session of somebody else is open."""


class _NotLoadedError(Unavailable):
    """The server, or the loader in it, refuses."""


class _HinderedError(Unavailable):
    """This is no time to change weights."""


async def _difference(fingerprint: DraftFingerprint, served: list[RankChecksums]) -> str:
    return await asyncio.to_thread(fingerprint.difference, served)


def _loaded(fingerprint: DraftFingerprint) -> LoadedDraft:
    return LoadedDraft(
        version=fingerprint.version,
        tensors_digest=fingerprint.tensors_digest,
        draft_vocabulary_fingerprint=fingerprint.vocabulary_fingerprint,
    )


def _unproved(fingerprint: DraftFingerprint) -> LoadedDraft:
    return replace(_loaded(fingerprint), tensors_digest="sha256:unproved")


def _named(fingerprint: DraftFingerprint) -> Named:
    """What the plugin's loader takes: see updraft_sglang.weights."""
    return [
        ("folder", _text(str(fingerprint.folder.resolve()))),
        ("version", torch.tensor([fingerprint.version], dtype=torch.int64)),
        ("digest", _text(fingerprint.tensors_digest)),
    ]


def _text(value: str) -> torch.Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)
