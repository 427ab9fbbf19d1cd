"""An archive on a folder without a process around it, to be closed, tampered with and opened again."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.support.checkpoints import Checkpoint
from tests.support.versions import NOW_MS

from updraft_registry.rollout.decision import decide
from updraft_registry.storage.archive import Archive, Recovered, open_archive
from updraft_registry.storage.catalogue import History
from updraft_rollouts.policy import RolloutPolicy
from updraft_rollouts.terms import Phase, Strategy

POLICY = RolloutPolicy(strategy=Strategy.IMMEDIATE)
"""No pods here that a canary could be tried on."""


class Opened:
    """An archive in a folder that can be closed, tampered with and opened again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self.recovered = Recovered(uploads=0, added=0, lost=0)
        self.archive = self._open()

    def _open(self) -> Archive:
        archive = self._stack.enter_context(open_archive(self.folder, defaults=POLICY, max_draft_bytes=10**6))
        self.recovered = archive.recover(NOW_MS)
        return archive

    def close(self) -> None:
        self._stack.close()

    def reopen(self) -> None:
        self.archive = self._open()

    def publish(self, weights: Checkpoint, **fields: Any) -> tuple[int, bool]:
        manifest = weights.manifest(**fields)
        known = self.archive.admit(manifest)
        if known is not None:
            return known, True
        upload = self.archive.begin(manifest)
        try:
            upload.write(0, weights.data)
            self.archive.verify(upload, manifest)
            return self.archive.publish(upload, manifest, NOW_MS)
        finally:
            upload.discard()

    def pin(self, number: int | None, reason: str = "") -> None:
        self.archive.pin("default", number, reason, NOW_MS)
        self.settle()

    def settle(self) -> None:
        speculator = self.archive.catalogue.speculator("default")
        decision = decide(speculator, [], NOW_MS)
        self.archive.record("default", decision.transitions, decision.rollout)

    def phases(self) -> dict[int, Phase]:
        rows = self.archive.catalogue.page("default", after=None, size=100)
        return {version.number: version.phase for version, _ in rows}

    def history(self, number: int | None = None) -> History:
        return self.archive.catalogue.history("default", 1000, number=number)

    def blobs(self) -> set[str]:
        return {f"sha256:{path.name}" for path in (self.folder / "blobs" / "sha256").iterdir()}

    def blob(self, weights: Checkpoint) -> Path:
        return self.folder / "blobs" / "sha256" / weights.digest.removeprefix("sha256:")

    def lose_blob(self, weights: Checkpoint) -> None:
        self.blob(weights).unlink()

    def lose_catalogue(self) -> None:
        for path in self.folder.glob("catalogue.sqlite3*"):
            path.unlink()
