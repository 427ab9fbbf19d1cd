"""Restarts a server that Updraft started, because it builds its draft's network only at startup."""

import logging
from collections import Counter
from pathlib import Path
from typing import Protocol

from updraft_chassis.errors import InvalidInput, Unavailable, UpdraftError
from updraft_inference.engine import DraftCheckpoint

logger = logging.getLogger(__name__)


class Restartable(Protocol):
    """A server that can start again."""

    @property
    def draft(self) -> Path:
        """Folder of the draft that it started with."""
        ...

    async def restart(self, draft: Path) -> None:
        """Start again with another draft, once running requests have finished; returns when it serves."""
        ...


class Restarts:
    def __init__(self, server: Restartable) -> None:
        self._server = server
        self._failures: Counter[str] = Counter()
        """By digest of the draft."""

    @property
    def initial(self) -> Path:
        """The draft that the server started with."""
        return self._server.draft

    async def restart_with(self, draft: DraftCheckpoint) -> None:
        """Start the server with this draft. If it does not start, start it with the one before, and raise Unavailable; the
        second time InvalidInput, because the draft may be the reason."""
        before = self._server.draft
        try:
            await self._server.restart(draft.folder)
        except UpdraftError as error:
            logger.error("The server does not start with the new draft", extra={"reason": str(error)})
            await self._server.restart(before)  # also fails if this process is stopping
            self._failures[draft.tensors_digest] += 1
            is_second = self._failures[draft.tensors_digest] > 1
            message = f"the server does not start with version {draft.version}: {error}"
            raise (InvalidInput if is_second else Unavailable)(message) from error
