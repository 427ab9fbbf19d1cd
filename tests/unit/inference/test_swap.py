import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.support.clock import ManualClock
from tests.support.draft_folders import manifest, write_version
from tests.support.fake_engine import FakeEngine
from tests.support.wait import until

from updraft.fleet.v1 import fleet_pb2
from updraft_chassis.errors import NotFound, Unavailable
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
        self.fetched: list[int] = []
        self.go = asyncio.Event()
        self.go.set()

    async def fetch(self, version: int, digest: str | None) -> Path:
        self.fetched.append(version)
        await self.go.wait()
        if self.is_away:
            raise Unavailable("the registry is away")
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
        self.metrics = Metrics.on(CollectorRegistry())
        self.swapper = Swapper(
            self.engine,
            self.drafts,
            self.registry.fetch,
            metrics=self.metrics,
            clock=ManualClock(),
            on_change=self._changed,
        )

    def _changed(self) -> None:
        self.changes += 1

    def serve(self, version: int, *prefetch: int, nonce: str = "") -> str:
        """Give a directive; return its nonce."""
        nonce = nonce or f"serve {version} {prefetch}"
        content = self.registry.versions.get(version, b"")
        self.swapper.accept(
            fleet_pb2.Directive(
                nonce=nonce,
                serve_version=version,
                serve_digest=manifest(content).digest if version else "",
                prefetch_versions=[*prefetch, *([version] if version else [])],
            )
        )
        return nonce

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


@pytest.fixture
async def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


async def test_a_directive_is_fetched_swapped_in_and_acknowledged(pod: Pod) -> None:
    async with running(pod):
        status = await pod.answered(pod.serve(2, 3))

    assert status.outcome == ACK
    assert pod.engine.loaded.version == 2
    assert pod.swapper.loaded.tensors_digest == manifest(b"weights 2").tensors_digest
    assert pod.swapper.prefetched == [2, 3]
    assert pod.changes >= 2
    assert pod.metrics.draft_version._value.get() == 2


async def test_the_same_directive_twice_does_nothing_more(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.serve(2))
        pod.serve(2)
        await pod.answered(pod.serve(2, nonce="the same in another envelope"))

    assert pod.registry.fetched == [2]
    assert pod.swapper.counters.swaps == 1


async def test_version_zero_serves_without_a_draft(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.serve(2))
        assert (await pod.answered(pod.serve(0))).outcome == ACK

    assert pod.engine.loaded.version == 0
    assert pod.drafts.remembered() == 0


async def test_going_back_to_an_earlier_directive_is_followed_again(pod: Pod) -> None:
    async with running(pod):
        for version in (1, 2, 1):
            await pod.answered(pod.serve(version))
            assert pod.engine.loaded.version == version


async def test_a_newer_directive_interrupts_a_download(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.serve(1))
        pod.registry.go.clear()
        pod.serve(2)
        await until(lambda: pod.registry.fetched == [1, 2])
        nonce = pod.serve(3)
        await until(lambda: pod.registry.fetched == [1, 2, 3])
        pod.registry.go.set()
        status = await pod.answered(nonce)

    assert status.outcome == ACK
    assert pod.engine.loaded.version == 3
    assert pod.swapper.prefetched == [1, 3]


@pytest.mark.parametrize(
    ("version", "content", "target", "told"),
    [
        pytest.param(2, b"nan", "sha256:target", "not finite", id="a draft that is not finite"),
        pytest.param(2, b"weights", "sha256:other", "sha256:other", id="a draft for another target"),
        pytest.param(9, None, "sha256:target", "no version 9", id="a version that does not exist"),
    ],
)
async def test_what_is_refused_is_told_with_its_reason_and_the_old_draft_serves_on(
    pod: Pod, version: int, content: bytes | None, target: str, told: str
) -> None:
    async with running(pod):
        await pod.answered(pod.serve(1))
        pod.registry.target = target
        if content is not None:
            pod.registry.versions[version] = content
        status = await pod.answered(pod.serve(version))
        assert (status.outcome, status.version) == (NACK, version)
        assert told in status.reason
        assert pod.engine.loaded.version == 1
        assert pod.drafts.remembered() == 1
        assert pod.swapper.counters.failures == 1

        pod.registry.target = "sha256:target"
        assert (await pod.answered(pod.serve(3))).outcome == ACK


async def test_a_version_that_cannot_be_prefetched_is_named_and_the_other_serves(pod: Pod) -> None:
    async with running(pod):
        status = await pod.answered(pod.serve(1, 9))

    assert (status.outcome, status.version) == (NACK, 9)
    assert pod.engine.loaded.version == 1


async def test_a_registry_that_is_away_is_waited_for(pod: Pod) -> None:
    pod.registry.is_away = True
    async with running(pod):
        nonce = pod.serve(2)
        await until(lambda: "cannot fetch yet" in pod.swapper.status.reason)
        assert pod.swapper.status.outcome == PENDING

        pod.registry.is_away = False
        assert (await pod.answered(nonce)).outcome == ACK


async def test_a_registry_set_up_anew_counts_from_one_again(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.serve(1))
        pod.registry.versions[1] = b"other weights"
        await pod.answered(pod.serve(1, nonce="new"))

    assert pod.engine.loaded.tensors_digest == manifest(b"other weights").tensors_digest


async def test_the_last_draft_is_restored_without_the_registry(pod: Pod, tmp_path: Path) -> None:
    async with running(pod):
        await pod.answered(pod.serve(2))

    again = Pod(tmp_path)
    again.registry.is_away = True
    await again.swapper.restore()

    assert again.engine.loaded.version == 2
    assert not again.registry.fetched


@pytest.mark.parametrize("content", [None, b"weighty 2"])
async def test_a_last_draft_that_is_gone_or_broken_is_not_served(
    pod: Pod, tmp_path: Path, content: bytes | None
) -> None:
    async with running(pod):
        await pod.answered(pod.serve(2))
    weights = tmp_path / "2" / "model.safetensors"
    weights.unlink()
    if content is not None:
        weights.write_bytes(content)

    again = Pod(tmp_path)
    await again.swapper.restore()

    assert again.engine.loaded.version == 0


async def test_a_pod_that_never_served_a_draft_restores_none(pod: Pod) -> None:
    await pod.swapper.restore()

    assert pod.engine.loaded.version == 0
    assert pod.swapper.counters.swaps == 0
