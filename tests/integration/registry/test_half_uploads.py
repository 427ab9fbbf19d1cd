"""Uploads that claim two gigabytes and stop in the middle, again and again: neither disk nor memory keeps anything of them."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from tests.support.checkpoints import draft
from tests.support.registry import CALL_S, RegistryProcess, client, publish
from tests.support.wait import until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

STATED_BYTES = 2 * 1024**3
NUM_UPLOADS, AT_ONCE = 1000, 10
MIB = 1024**2


@pytest.fixture
def process(tmp_path: Path) -> Iterator[RegistryProcess]:
    with RegistryProcess(tmp_path) as registry:
        yield registry


def used_bytes(process: RegistryProcess) -> int:
    """Of the uploads' folder; a file may vanish while it is looked at."""
    total = 0
    for path in (process.data / "uploads").iterdir():
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


async def stop_half_way(stub: "RegistryAsyncStub", number: int) -> None:
    """Announce two gigabytes, send half a chunk of them, and go away."""
    digest = f"sha256:{number:064x}"  # of no version that is known
    manifest = draft(1).manifest(digest=digest, tensors_digest=digest, size_bytes=STATED_BYTES)
    call = stub.Publish(timeout=CALL_S)
    await call.write(pb.PublishRequest(manifest=manifest))
    await call.write(pb.PublishRequest(chunk=pb.Chunk(offset=0, data=bytes(rpc.CHUNK_BYTES // 2))))
    await asyncio.sleep(0)
    call.cancel()


@pytest.mark.attack(
    boundary="registry",
    attack="an upload of 2 GB that stops half-way, a thousand times",
    outcome="nothing stays on the disk, memory does not grow, and the next upload succeeds",
)
async def test_uploads_that_stop_half_way_leave_nothing_on_the_disk_or_in_memory(process: RegistryProcess) -> None:
    most_bytes = 0
    async with client(process.address) as stub:
        await publish(stub, draft(1))
        for number in range(100):
            await stop_half_way(stub, number)
        before = psutil.Process(process.pid).memory_info().rss
        for first in range(0, NUM_UPLOADS, AT_ONCE):
            await asyncio.gather(*(stop_half_way(stub, 100 + first + number) for number in range(AT_ONCE)))
            most_bytes = max(most_bytes, used_bytes(process))
        await until(
            lambda: used_bytes(process) == 0 and not any((process.data / "uploads").iterdir()), what="no upload"
        )
        assert most_bytes <= 64 * MIB
        assert psutil.Process(process.pid).memory_info().rss - before < 48 * MIB
        assert (await publish(stub, draft(2))).version.version == 2
    assert psutil.Process(process.pid).num_fds() < 100
