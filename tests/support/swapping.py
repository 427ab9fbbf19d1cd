"""A swapper and what is around it: a fake engine, a folder of drafts, and a registry to fetch from, under the test's hand."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from tests.support.clock import ManualClock
from tests.support.draft_folders import manifest, write_version
from tests.support.fake_engine import FakeEngine
from tests.support.wait import until

from updraft.fleet.v1 import fleet_pb2
from updraft_chassis.errors import NotFound, Unavailable, UpdraftError
from updraft_inference.agent.drafts import DraftFolder
from updraft_inference.agent.swap import Swapper
from updraft_inference.metrics import Metrics

ACK, NACK, PENDING = fleet_pb2.OUTCOME_ACK, fleet_pb2.OUTCOME_NACK, fleet_pb2.OUTCOME_PENDING


class FakeRegistry:
    """Versions that can be fetched into a folder; away or slow on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions = {n: b"weights %d" % n for n in range(1, 6)}
        self.target = "sha256:target"
        self.is_away = False
        self.fails: UpdraftError | None = None
        self.is_disk_full = False
        self.fetched: list[int] = []
        self.go = asyncio.Event()
        self.go.set()
        self.never: set[int] = set()
        """Versions whose fetch does not end."""

    async def fetch(self, version: int, digest: str | None) -> Path:
        self.fetched.append(version)
        if version in self.never:
            await asyncio.Event().wait()
        await self.go.wait()
        if self.is_away:
            raise Unavailable("the registry is away")
        if self.fails is not None:
            raise self.fails
        if self.is_disk_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        if version not in self.versions:
            raise NotFound(f"no version {version}")
        return write_version(self.folder, version, self.versions[version], target=self.target)


class Pod:
    """A swapper and what is around it."""

    def __init__(self, folder: Path) -> None:
        self.engine = FakeEngine()
        self.registry = FakeRegistry(folder)
        self.drafts = DraftFolder(folder)
        self.changes = 0
        self.metrics = Metrics(CollectorRegistry())
        self.clock = ManualClock()
        self.swapper = Swapper(
            self.engine,
            self.drafts,
            self.registry.fetch,
            metrics=self.metrics,
            clock=self.clock,
            on_change=self._changed,
        )

    def _changed(self) -> None:
        self.changes += 1

    def serve(self, version: int, *prefetch: int, nonce: str = "", **fields: Any) -> str:
        """Give a directive; return its nonce. `fields` are more of its fields."""
        nonce = nonce or f"serve {version} {prefetch} {fields}"
        self.swapper.accept(
            fleet_pb2.Directive(
                nonce=nonce,
                serve_version=version,
                serve_digest=self.digest(version),
                prefetch_versions=[*prefetch, *([version] if version else [])],
                **fields,
            )
        )
        return nonce

    def alternate(self, a: int, b: int, *, slice_seconds: int = 20, nonce: str = "") -> str:
        """Give a directive to alternate from now on, `a` first; return its nonce."""
        plan = fleet_pb2.Switchback(
            version_a=a,
            version_b=b,
            slice_seconds=slice_seconds,
            start_unix_ms=int(1000 * self.clock.now()),
            digest_a=self.digest(a),
            digest_b=self.digest(b),
        )
        return self.serve(a, b, nonce=nonce, switchback=plan)

    def digest(self, version: int) -> str:
        return manifest(self.registry.versions.get(version, b"")).digest if version else ""

    async def serves(self, version: int) -> None:
        """Wait until the engine holds it."""
        await until(lambda: self.engine.loaded.version == version, what=f"version {version} serves")

    async def answered(self, nonce: str) -> fleet_pb2.DirectiveStatus:
        """The final status of that directive."""
        await until(lambda: self.swapper.status.nonce == nonce and self.swapper.status.outcome in (ACK, NACK))
        return self.swapper.status


@asynccontextmanager
async def running(pod: Pod) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(pod.swapper.run())
        yield
        task.cancel()
