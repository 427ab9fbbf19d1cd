"""A full disk: one sentence, nothing changed, and everything works again once there is room.

A small tmpfs where this user may mount one; everywhere, a limit on the size of the process's files.
"""

import resource
import subprocess
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import pytest
from tests.support.checkpoints import draft, evaluation
from tests.support.registry import (
    CALL_S,
    PodStream,
    RegistryProcess,
    fetch,
    found_again,
    parts,
    publish,
    registry_stub,
    send,
    state,
)
from tests.support.wait import until

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import Exhausted
from updraft_registry.settings import RegistrySettings
from updraft_registry.storage.maintenance import fsck, open_folder

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

SIZE_KIB = 2048


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_KIB}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs; the file size limit is tested below")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all the room that is left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for block in (64 * 1024, 512):
            try:
                while file.write(bytes(block)) == block:
                    pass
            except OSError:
                pass
    return filler


@pytest.mark.attack(
    boundary="registry",
    attack="an upload larger than the disk",
    outcome="refused before its first byte",
)
async def test_a_draft_larger_than_the_room_is_refused_before_its_first_byte(small_disk: Path) -> None:
    with RegistryProcess(small_disk) as process:
        async with rpc.channel(process.address) as channel:
            large = draft(fc=bytes(SIZE_KIB * 1024))
            with pytest.raises(Exhausted, match="bytes left, the draft needs"):
                await publish(registry_stub(channel), large)


async def test_a_disk_that_fills_up_during_an_upload_costs_that_upload_only(small_disk: Path) -> None:
    with RegistryProcess(small_disk) as process:
        async with rpc.channel(process.address) as channel:
            stub = registry_stub(channel)
            await publish(stub, draft(1))
            large = draft(fc=bytes(1024 * 1024))
            call = stub.Publish(timeout=CALL_S)
            messages = parts(large.manifest(), large.data, chunk_bytes=64 * 1024)
            for _ in range(3):
                await call.write(next(messages))
            await until(lambda: any((process.data / "uploads").iterdir()), what="the upload has begun")
            filler = fill(small_disk)
            with pytest.raises(Exhausted, match="is full; nothing was changed: free some space"):
                await _finish(call, messages)
            assert (await state(stub)).latest == 1
            assert list((process.data / "uploads").iterdir()) == []
            filler.unlink()
            assert (await publish(stub, large)).version.version == 2


async def test_a_disk_without_room_for_a_row_keeps_the_old_state_and_pods_hear_nothing(small_disk: Path) -> None:
    with RegistryProcess(small_disk) as process:
        async with rpc.channel(process.address) as channel:
            stub = registry_stub(channel)
            await publish(stub, draft(1))
            pod = PodStream(channel)
            await pod.report()
            await pod.receive()
            loaded = (1, draft(1).manifest().tensors_digest)
            await pod.answer(fleet_pb2.OUTCOME_ACK, loaded=loaded)
            before = await state(stub)
            filler = fill(small_disk)
            candidate = {"source": pb.SOURCE_TRAINER, "evaluation": evaluation(baseline=1, num_samples=400)}
            with pytest.raises(Exhausted):
                await publish(stub, draft(2), **candidate)
            with pytest.raises(Exhausted):
                await _pin_often(stub)
            process.kill()
            filler.unlink()
            process.start()
            await found_again(channel)
            now = await state(stub)
            assert (now.stable, now.latest) == (before.stable, before.latest)
            second = await publish(stub, draft(2), **candidate)
            assert (second.version.version, second.version.phase) == (2, pb.PHASE_STABLE)


async def test_a_start_on_a_full_disk_serves_what_is_there_or_is_one_sentence(tmp_path: Path, small_disk: Path) -> None:
    with RegistryProcess(tmp_path, data_dir=small_disk / "registry") as process:
        async with rpc.channel(process.address) as channel:
            stub = registry_stub(channel)
            await publish(stub, draft(1))
            process.kill()
            filler = fill(small_disk)
            process.start()
            await found_again(channel)
            assert (await state(stub)).stable == 1
            assert await fetch(stub, 1) == draft(1).data
            filler.unlink()
            assert process.terminate() == 0
            filler = fill(small_disk)
            process.spawn()  # after a clean end SQLite has to make its files anew
            assert process.wait() == 1
            assert "is full; nothing was changed" in process.log.splitlines()[-1]
            assert "Traceback" not in process.log
            filler.unlink()
            process.start()
            await found_again(channel)
            assert (await state(stub)).stable == 1


async def test_whatever_a_person_decides_on_a_full_disk_is_refused_or_done_and_never_half(small_disk: Path) -> None:
    with RegistryProcess(small_disk, strategy="Immediate") as process:
        async with rpc.channel(process.address) as channel:
            stub = registry_stub(channel)
            for seed in (1, 2, 3):
                await publish(stub, draft(seed))
            filler = fill(small_disk)
            with pytest.raises(Exhausted):
                await _pin_often(stub)
            before = await state(stub)
            calls: list[Awaitable[object]] = [
                stub.Promote(pb.PromoteRequest(speculator="default", version=2, reason="x" * 500), timeout=CALL_S),
                stub.Reject(pb.RejectRequest(speculator="default", version=3, reason="x" * 500), timeout=CALL_S),
                stub.Retain(pb.RetainRequest(speculator="default", version=1, retain=True), timeout=CALL_S),
            ]
            for call in calls:
                with pytest.raises(Exhausted, match="is full; nothing was changed"), rpc.errors():
                    await call
            assert await state(stub) == before
            filler.unlink()
            await stub.Unpin(pb.UnpinRequest(speculator="default"), timeout=CALL_S)
            with rpc.errors():
                await stub.Promote(pb.PromoteRequest(speculator="default", version=2), timeout=CALL_S)
            assert (await state(stub)).stable == 2
        assert process.terminate() == 0
        with open_folder(RegistrySettings(data_dir=process.data), SystemClock()) as folder:
            outcome = fsck(folder, is_repairing=False, is_hashing=True, progress=lambda _done, _total: None)
        assert outcome.found == (), "and the documents say it too"


async def _finish(
    call: grpc.aio.StreamUnaryCall[pb.PublishRequest, pb.PublishResponse], messages: Iterator[pb.PublishRequest]
) -> None:
    with rpc.errors():
        for message in messages:
            await call.write(message)
        await call.done_writing()
        await call


async def _pin_often(stub: "RegistryAsyncStub") -> None:
    """Until the write-ahead log has no room left."""
    with rpc.errors():
        for i in range(2000):
            request = pb.PinRequest(speculator="default", version=1, reason=f"{i} " + "x" * 400)
            await stub.Pin(request, timeout=CALL_S)


async def test_files_that_may_not_grow_are_a_full_disk(process: RegistryProcess) -> None:
    async with rpc.channel(process.address) as channel:
        stub = registry_stub(channel)
        await publish(stub, draft(1))
        large = draft(fc=bytes(1024 * 1024))
        limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (256 * 1024, limits[1]))
        with pytest.raises(Exhausted, match="is full; nothing was changed"):
            await send(stub, parts(large.manifest(), large.data, chunk_bytes=64 * 1024))
        assert (await state(stub)).latest == 1
        assert list((process.data / "uploads").iterdir()) == []
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
        assert (await publish(stub, large)).version.version == 2


async def test_a_catalogue_that_may_not_grow_changes_nothing_and_recovers(process: RegistryProcess) -> None:
    async with rpc.channel(process.address) as channel:
        stub = registry_stub(channel)
        await publish(stub, draft(1))
        before = await state(stub)
        limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(Exhausted, match=r"catalogue.sqlite3 is full"):
            await _pin_often(stub)
        assert await state(stub) == before
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
        await stub.Pin(pb.PinRequest(speculator="default", version=0), timeout=CALL_S)
        assert (await state(stub)).stable == 0
    assert process.is_running
