"""The loop between calls, fleet and archive: retention, expiry, and decisions that nobody waits for."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.support.checkpoints import draft, evaluation
from tests.support.clock import ManualClock
from tests.support.disk import file_size_limit
from tests.support.wait import LONG_S, until

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import Exhausted, Unavailable
from updraft_registry.control import SETTLE_S, SWEEP_GRACE_S, SWEEP_RETRY_S, Control
from updraft_registry.fleet import Fleet, Session
from updraft_registry.messages import reports
from updraft_registry.messages.reports import Report
from updraft_registry.metrics import Metrics
from updraft_registry.storage.archive import Archive, open_archive
from updraft_registry.storage.stores.folder import FolderStore
from updraft_registry.storage.stores.port import Store
from updraft_rollouts.policy import RolloutPolicy
from updraft_rollouts.terms import Phase, Strategy


@dataclass
class Running:
    """A control that runs, with a clock under the test's hand."""

    archive: Archive
    control: Control
    clock: ManualClock
    folder: Path

    async def publish(self, seed: int, **fields: Any) -> int:
        manifest = draft(seed).manifest(**fields)
        upload = self.archive.begin(manifest)
        upload.write(0, draft(seed).data)
        self.archive.verify(upload, manifest)
        number, _ = await self.control.change(
            manifest.speculator, self.archive.publish, upload, manifest, self.control.now_ms()
        )
        upload.discard()
        return number

    async def publish_better(self, number: int) -> None:
        """A version that wins against the one before it."""
        fields = {"source": registry_pb2.SOURCE_TRAINER, "evaluation": evaluation(baseline=number - 1)}
        assert await self.publish(number, **fields) == number

    async def pin(self, number: int) -> None:
        await self.control.change("default", self.archive.pin, "default", number, "", self.control.now_ms())

    def kept(self) -> set[int]:
        stored = {f"sha256:{path.name}" for path in (self.folder / "blobs" / "sha256").iterdir()}
        return {seed for seed in range(1, 20) if draft(seed).digest in stored}


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with controlled(tmp_path) as running:
        yield running


@asynccontextmanager
async def controlled(
    folder: Path, store: Callable[[Path], Store] = FolderStore, *, history: int = 1
) -> AsyncIterator[Running]:
    defaults = RolloutPolicy(strategy=Strategy.IMMEDIATE, revision_history_limit=history)
    with open_archive(folder, defaults=defaults, max_draft_bytes=10**6, store=store) as archive:
        clock = ManualClock()
        control = Control(archive, Fleet(expiry_s=45.0), clock, Metrics(CollectorRegistry()))
        async with asyncio.TaskGroup() as tasks:
            deciding = tasks.create_task(control.run())
            yield Running(archive=archive, control=control, clock=clock, folder=folder)
            deciding.cancel()
        control.join()


def report(
    pod: str = "pod-0",
    *,
    loaded: int = 0,
    digest: str = "",
    prefetched: tuple[int, ...] = (),
    steps: int = 0,
    refused: int = 0,
) -> Report:
    outcome = fleet_pb2.OUTCOME_NACK if refused else fleet_pb2.OUTCOME_UNSPECIFIED
    return reports.read(
        fleet_pb2.PodReport(
            identity=fleet_pb2.PodIdentity(speculator="default", pod=pod),
            loaded=fleet_pb2.Loaded(version=loaded, tensors_digest=digest),
            status=fleet_pb2.DirectiveStatus(outcome=outcome, version=refused, reason="its disk is broken"),
            prefetched_versions=prefetched,
            versions=[fleet_pb2.VersionCounters(version=1, verify_steps=steps)] if steps else [],
        )
    )


async def test_old_weights_go_once_the_pods_had_time_to_say_what_they_hold(running: Running) -> None:
    for seed in range(1, 6):
        await running.publish(seed)
        await running.pin(seed)
    assert running.kept() == {1, 2, 3, 4, 5}
    running.control.report(Session(), report(loaded=2, prefetched=(1,)))
    running.clock.advance(SWEEP_GRACE_S - 30.0)
    running.control.report(Session(), report(loaded=2, prefetched=(1,)))
    running.clock.advance(30.0)
    await until(lambda: running.kept() == {1, 2, 4, 5}, what="version 3 is deleted: 1 has won, 4 waits to be tried")
    running.clock.advance(50.0)
    await until(lambda: running.kept() == {1, 4, 5}, what="what the pod held is deleted after it has gone")
    state = await running.control.state("default")
    assert (state.stable, state.previous, state.latest) == (5, 1, 5)


class Small(FolderStore):
    """A store on a disk with room for three drafts."""

    def free_bytes(self) -> int:
        return 3 * len(draft(1).data) - sum(self._blob(digest).stat().st_size for digest in self.digests())


async def test_a_full_volume_loses_the_oldest_weights_that_nobody_needs(tmp_path: Path) -> None:
    async with controlled(tmp_path, Small, history=9) as running:
        await running.publish(1)
        for seed in (2, 3):
            await running.publish_better(seed)
        fourth = draft(4).manifest(source=registry_pb2.SOURCE_TRAINER, evaluation=evaluation(baseline=3))
        with pytest.raises(Exhausted, match=r"bytes left, the draft needs .* send it again in a minute"):
            await running.control.begin_evicting(fourth)
        running.clock.advance(SWEEP_GRACE_S)
        upload = await running.control.begin_evicting(fourth)
        upload.discard()
        assert running.kept() == {2, 3}
        history = running.archive.catalogue.history("default", 10, number=1)
        assert next(iter(history.values())).reason == "its weights were deleted, because the volume was full"
        await running.publish_better(4)
        await until(lambda: running.archive.catalogue.speculator("default").latest == 4, what="version 4 is there")
        assert running.kept() == {2, 3, 4}


async def test_a_volume_full_of_needed_weights_refuses_and_deletes_nothing(tmp_path: Path) -> None:
    async with controlled(tmp_path, Small, history=9) as running:
        await running.publish(1)
        for seed in (2, 3):
            await running.publish_better(seed)
        await running.control.change(
            "default", running.archive.retain, "default", 1, is_retained=True, now_ms=running.control.now_ms()
        )
        running.clock.advance(SWEEP_GRACE_S)
        with pytest.raises(Exhausted, match="and all versions are needed; nothing was deleted: expand the volume"):
            await running.control.begin_evicting(draft(4).manifest())
        assert running.kept() == {1, 2, 3}


async def test_weights_that_pods_hold_or_another_version_shares_make_no_room(tmp_path: Path) -> None:
    async with controlled(tmp_path, Small, history=9) as running:
        for name in ("default", "other"):
            await running.publish(1, speculator=name)
        for seed in (2, 3):
            await running.publish_better(seed)
        running.clock.advance(SWEEP_GRACE_S)
        with pytest.raises(Exhausted, match="all versions are needed"):
            await running.control.begin_evicting(draft(4).manifest())
        running.control.report(Session(), report(loaded=3, prefetched=(1,)))
        with pytest.raises(Exhausted, match="all versions are needed"):
            await running.control.begin_evicting(draft(4).manifest())
        assert running.kept() == {1, 2, 3}


class Elsewhere(FolderStore):
    """A store whose blobs are not on the full disk that uploads need, as those of a bucket."""

    shares_disk = False

    def free_bytes(self) -> int:
        return 0


async def test_where_weights_are_in_a_bucket_a_full_disk_is_no_reason_to_release_any(tmp_path: Path) -> None:
    async with controlled(tmp_path, Elsewhere) as running:
        running.clock.advance(SWEEP_GRACE_S)
        with pytest.raises(
            Exhausted, match=r"the volume for uploads has 0 bytes left .* expand it by \d+ bytes or more$"
        ):
            await running.control.begin_evicting(draft(1).manifest())


class Larger(Small):
    """One with room for a fourth."""

    def free_bytes(self) -> int:
        return super().free_bytes() + len(draft(1).data)


async def test_a_version_whose_weights_another_one_needs_is_not_lost_for_room_that_it_does_not_make(
    tmp_path: Path,
) -> None:
    async with controlled(tmp_path, Larger, history=9) as running:
        for name in ("default", "other"):
            await running.publish(1, speculator=name)
        for seed in (2, 3, 4):
            await running.publish_better(seed)
        running.clock.advance(SWEEP_GRACE_S)
        upload = await running.control.begin_evicting(draft(5).manifest())
        upload.discard()
        assert running.kept() == {1, 3, 4}
        kept = {
            version.number for version in running.archive.catalogue.speculator("default").versions if version.is_kept
        }
        assert kept == {1, 3, 4}


async def test_what_pods_hold_is_read_on_the_event_loop_when_weights_are_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another thread a pod that comes at that moment would break the reading, and with it the upload."""
    read, in_use = [], Fleet.in_use

    def reading(fleet: Fleet, speculator: str) -> frozenset[int]:
        read.append(asyncio.get_running_loop())  # RuntimeError on the archive's thread
        return in_use(fleet, speculator)

    async with controlled(tmp_path, history=9) as running:
        await running.publish(1)
        running.clock.advance(SWEEP_GRACE_S)
        monkeypatch.setattr(Fleet, "in_use", reading)
        upload = await running.control.begin_evicting(draft(2).manifest())
        upload.discard()
    assert read


class Away(FolderStore):
    """A store whose place does not answer at first."""

    is_away = True
    asked = 0

    def digests(self) -> frozenset[str]:
        self.asked += 1
        if self.is_away:
            raise Unavailable("the place is away")
        return super().digests()


async def test_after_a_store_was_away_the_sweep_rests_and_then_deletes_what_it_had_left(tmp_path: Path) -> None:
    store = Away(tmp_path)
    async with controlled(tmp_path, lambda _: store) as running:
        for seed in range(1, 6):
            await running.publish(seed)
            await running.pin(seed)
        running.clock.advance(SWEEP_GRACE_S)
        await until(lambda: store.asked == 1, what="a sweep fails")
        store.is_away = False
        session = Session()
        for steps in (1, 2):
            changed = running.control.changed
            running.control.report(session, report(steps=steps))
            async with asyncio.timeout(LONG_S):
                await changed.wait()
        assert store.asked == 1
        running.clock.advance(SWEEP_RETRY_S)
        await until(lambda: running.kept() == {1, 4, 5}, what="the next sweep deletes what the first one could not")


async def test_what_a_killed_registry_left_is_deleted_though_no_version_goes(running: Running) -> None:
    await running.publish(1)
    (running.folder / "blobs" / "sha256" / draft(7).digest.removeprefix("sha256:")).write_bytes(draft(7).data)
    assert running.kept() == {1, 7}
    running.clock.advance(SWEEP_GRACE_S)
    await until(lambda: running.kept() == {1}, what="the blob that is nobody's is deleted")


async def test_a_wish_that_is_written_has_succeeded_though_its_decision_has_to_wait(running: Running) -> None:
    for seed in (1, 2):
        await running.publish(seed)
    with ExitStack() as full:

        def pin_and_fill() -> None:
            running.archive.pin("default", 2, "", running.control.now_ms())
            full.enter_context(file_size_limit(4096))

        await running.control.change("default", pin_and_fill)
        state = await running.control.state("default")
        assert state.stable == 1
        assert "the next decision could not be written: the disk of" in state.message
    await until(lambda: _stable(running, 2), what="the wish is followed once there is room")
    assert "not decided" not in (await running.control.state("default")).message


async def test_a_silent_pod_is_forgotten(running: Running) -> None:
    session = Session()
    await running.publish(1)
    running.control.report(session, report())
    running.clock.advance(46.0)
    await until(lambda: _pods(running, 0), what="the pod is forgotten")
    with pytest.raises(Unavailable, match="no report for 45 s"):
        session.check()


async def test_silent_pods_are_forgotten_however_busy_the_registry_is(running: Running) -> None:
    await running.publish(1)
    silent, busy = Session(), Session()
    running.control.report(silent, report("silent"))
    running.clock.advance(46.0)
    for i in range(10_000):
        running.control.report(busy, report("busy", loaded=i % 2))
        await asyncio.sleep(0)
        if silent.is_closed:
            break
        await asyncio.sleep(0.001)
    assert silent.is_closed


async def test_a_caller_that_goes_away_does_not_stop_the_decision(running: Running) -> None:
    manifest = draft(1).manifest()
    upload = running.archive.begin(manifest)
    upload.write(0, draft(1).data)
    running.archive.verify(upload, manifest)
    has_begun, may_end = threading.Event(), threading.Event()

    def publish_slowly() -> None:
        has_begun.set()
        may_end.wait()
        running.archive.publish(upload, manifest, 1)

    async with asyncio.TaskGroup() as tasks:
        caller = tasks.create_task(running.control.change("default", publish_slowly))
        await until(has_begun.is_set, what="the change has begun")
        caller.cancel()
        may_end.set()
    await until(lambda: _stable(running, 1), what="version 1 is stable")


async def test_watchers_hear_of_traffic_without_any_decision(running: Running) -> None:
    await running.publish(1)
    session = Session()
    running.control.report(session, report())
    await running.control.change("default", lambda: None)
    changed = running.control.changed
    running.control.report(session, report(steps=7))
    async with asyncio.timeout(LONG_S):
        await changed.wait()
    assert [traffic.verify_steps for traffic in (await running.control.state("default")).traffic] == [7]


async def test_a_message_is_never_older_than_the_counts_beside_it(running: Running) -> None:
    await running.publish(1)
    session = Session()
    running.control.report(session, report())
    await running.control.change("default", lambda: None)
    running.control.report(session, report(loaded=1, digest=draft(1).manifest().tensors_digest))
    state = await running.control.state("default")  # nothing was decided in between
    assert (state.pods.serving_stable, state.message) == (1, "version 1 is stable")


async def test_a_canary_goes_on_by_time_alone(running: Running) -> None:
    await running.publish(1)
    sessions = [Session() for _ in range(4)]
    policy = registry_pb2.RolloutPolicy(
        strategy=registry_pb2.STRATEGY_CANARY,
        steps=[registry_pb2.RolloutStep(pods_percent=25, hold_seconds=10)],
        analysis=registry_pb2.Analysis(dry_run=True),
    )
    archive, now_ms = running.archive, running.control.now_ms()
    await running.control.change("default", archive.set_policy, "default", policy, now_ms)
    digests = {number: draft(number).manifest().tensors_digest for number in (1, 2)}
    for i, session in enumerate(sessions):
        running.control.report(session, report(f"pod-{i}", loaded=1, digest=digests[1]))
    await running.publish(2, source=registry_pb2.SOURCE_TRAINER, evaluation=evaluation(baseline=1))
    assert (await running.control.state("default")).candidate == 2
    for i, session in enumerate(sessions):
        running.control.report(session, report(f"pod-{i}", loaded=2, digest=digests[2]))
    await running.control.change("default", lambda: None)
    running.clock.advance(11.0)
    await until(lambda: _stable(running, 2), what="version 2 is promoted though no pod says anything")


async def test_one_pod_that_comes_back_first_and_refuses_fails_nothing(tmp_path: Path) -> None:
    async with controlled(tmp_path) as running:
        await running.publish(1)
    async with controlled(tmp_path) as running:
        await until(lambda: running.control.is_ready, what="the registry has started again")
        running.control.report(Session(), report("broken", refused=1))
        await running.control.change("default", lambda: None)
        assert (await running.control.state("default")).stable == 1
        running.clock.advance(SETTLE_S)
        await until(lambda: _stable(running, 0), what="nobody else came, so it fails")


async def test_a_decision_that_waits_for_the_archive_uses_the_time_of_its_view_of_the_pods(
    running: Running,
) -> None:
    """At a later time, a switchback would direct the pods to the other version."""

    async def failed_ms() -> list[int]:
        speculator = await running.control.call(running.archive.catalogue.speculator, "default")
        return [version.since_ms for version in speculator.versions if version.phase is Phase.FAILED]

    async def has_failed() -> bool:
        return bool(await failed_ms())

    await running.publish(1)
    seen_ms, busy = running.control.now_ms(), threading.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(running.control.call(busy.wait, LONG_S))
        running.control.report(Session(), report(refused=1))
        await until(lambda: running.control._thread._work_queue.qsize() > 0, what="a decision waits")
        running.clock.advance(3600.0)
        busy.set()
    await until(has_failed, what="the version has failed")
    assert await failed_ms() == [seen_ms]


@pytest.mark.attack(
    boundary="registry",
    attack="questions about ever more invented speculators",
    outcome="none is remembered",
)
async def test_names_that_somebody_asked_for_are_not_remembered(running: Running) -> None:
    for i in range(5):
        await running.control.change(f"name-{i}", lambda: None)
    assert (await running.control.state("name-1")) == registry_pb2.SpeculatorState(
        speculator="name-1",
        message="nothing is published yet",
        policy=(await running.control.state("other")).policy,
        pods=registry_pb2.Pods(),
        volume_bytes=running.archive.store.volume_bytes(),
        max_draft_bytes=10**6,
    )
    assert running.archive.catalogue.names() == ()


async def _pods(running: Running, count: int) -> bool:
    return (await running.control.state("default")).pods.connected == count


async def _stable(running: Running, number: int) -> bool:
    return (await running.control.state("default")).stable == number
