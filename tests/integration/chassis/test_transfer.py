from __future__ import annotations

import hashlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.ports import free_port
from tests.support.rpc import service, serving

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_artifacts import partial_download, transfer
from updraft_chassis import rpc
from updraft_chassis.errors import Conflict, Corrupt, Exhausted, InvalidInput, NotFound, Unavailable, UpdraftError

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

WEIGHTS = os.urandom(2 * rpc.CHUNK_BYTES + 12_345)


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def manifest(data: bytes = WEIGHTS) -> pb.Manifest:
    return pb.Manifest(speculator="chat", digest=digest(data), size_bytes=len(data), config_json='{"k": 3}')


class Registry:
    """One version, `stored`, announced as `manifest`; the attributes make it misbehave."""

    def __init__(self) -> None:
        self.manifest = manifest()
        self.stored = WEIGHTS
        self.encoding = pb.ENCODING_IDENTITY
        self.stops_after_bytes: int | None = None
        self.skips_bytes = 0
        self.knows_already = False
        self.refusal: UpdraftError | None = None
        self.offsets: list[int] = []
        self.received = b""

    async def publish(self, requests: AsyncIterator[pb.PublishRequest], context: Any) -> pb.PublishResponse:
        async for request in requests:
            if request.HasField("manifest"):
                if self.refusal:
                    raise self.refusal
                if self.knows_already:
                    break
            else:
                assert request.chunk.offset == len(self.received)
                self.received += request.chunk.data
        return pb.PublishResponse(version=pb.Version(version=7), existed=self.knows_already)

    async def get(self, request: pb.GetRequest, context: Any) -> pb.GetResponse:
        if request.version != 7:
            raise NotFound(f"chat has no version {request.version}")
        return pb.GetResponse(version=pb.Version(version=7, manifest=self.manifest))

    async def fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.FetchResponse]:
        self.offsets.append(request.offset)
        start = pb.FetchResponse.Start(encoding=self.encoding, size_bytes=len(self.stored), digest=self.manifest.digest)
        yield pb.FetchResponse(start=start)
        end = self.stops_after_bytes or len(self.stored)
        for offset in range(request.offset + self.skips_bytes, end, rpc.CHUNK_BYTES):
            data = self.stored[offset : min(end, offset + rpc.CHUNK_BYTES)]
            yield pb.FetchResponse(chunk=pb.Chunk(offset=offset, data=data))

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[RegistryAsyncStub]:
        methods = service(
            pb.DESCRIPTOR.services_by_name["Registry"], Publish=self.publish, Get=self.get, Fetch=self.fetch
        )
        async with serving(methods) as channel:
            yield RegistryStub(channel)


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
async def stub(registry: Registry) -> AsyncIterator[RegistryAsyncStub]:
    async with registry.stub() as stub:
        yield stub


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(WEIGHTS)
    return path


def is_clean(folder: Path) -> bool:
    """Whether there is nothing but finished versions."""
    return all(child.name.isdecimal() for child in folder.iterdir())


async def test_an_upload_arrives_as_it_is(registry: Registry, stub: RegistryAsyncStub, weights: Path) -> None:
    response = await transfer.upload(stub, manifest(), weights)
    assert response.version.version == 7
    assert registry.received == WEIGHTS


async def test_an_upload_of_a_digest_that_is_known_succeeds(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    registry.knows_already = True
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(64 * rpc.CHUNK_BYTES)
    response = await transfer.upload(stub, pb.Manifest(size_bytes=path.stat().st_size), path)
    assert response.existed


async def test_a_refused_upload_raises_what_the_registry_said(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    registry.refusal = Conflict("another target")
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(64 * rpc.CHUNK_BYTES)
    with pytest.raises(Conflict, match="another target"):
        await transfer.upload(stub, pb.Manifest(size_bytes=path.stat().st_size), path)


async def test_an_upload_needs_the_file_that_the_manifest_describes(stub: RegistryAsyncStub, weights: Path) -> None:
    with pytest.raises(NotFound, match="there is no file"):
        await transfer.upload(stub, manifest(), weights.parent / "other")
    with pytest.raises(InvalidInput, match="its manifest says 3"):
        await transfer.upload(stub, manifest(b"abc"), weights)


async def test_a_download_is_a_folder_that_stock_engines_load(stub: RegistryAsyncStub, tmp_path: Path) -> None:
    folder = await transfer.download(stub, "chat", 7, tmp_path)
    assert folder == tmp_path / "7"
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert json.loads((folder / "config.json").read_text()) == {"k": 3}
    assert json.loads((folder / "manifest.json").read_text())["digest"] == digest(WEIGHTS)
    assert transfer.is_complete(folder, digest(WEIGHTS))
    assert is_clean(tmp_path)


async def test_an_empty_weights_file_is_a_file_too(registry: Registry, stub: RegistryAsyncStub, tmp_path: Path) -> None:
    registry.stored, registry.manifest = b"", manifest(b"")
    assert transfer.is_complete(await transfer.download(stub, "chat", 7, tmp_path), digest(b""))


async def test_a_complete_folder_is_not_fetched_again(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    await transfer.download(stub, "chat", 7, tmp_path)
    await transfer.download(stub, "chat", 7, tmp_path)
    assert registry.offsets == [0]


async def test_a_complete_folder_of_known_digest_needs_no_registry(registry: Registry, tmp_path: Path) -> None:
    async with registry.stub() as stub:
        folder = await transfer.download(stub, "chat", 7, tmp_path)
    async with rpc.channel(f"127.0.0.1:{free_port()}") as channel:
        nobody: RegistryAsyncStub = RegistryStub(channel)
        assert await transfer.download(nobody, "chat", 7, tmp_path, digest=digest(WEIGHTS)) == folder
        with pytest.raises(Unavailable):
            await transfer.download(nobody, "chat", 7, tmp_path)


async def test_a_version_that_does_not_exist_is_not_found(stub: RegistryAsyncStub, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no version 8"):
        await transfer.download(stub, "chat", 8, tmp_path)
    assert is_clean(tmp_path)


async def test_a_version_known_by_another_digest_is_a_conflict(stub: RegistryAsyncStub, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="as version 7"):
        await transfer.download(stub, "chat", 7, tmp_path, digest=digest(b"other"))


async def test_a_download_that_breaks_off_resumes_where_it_stopped(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    registry.stops_after_bytes = rpc.CHUNK_BYTES + 1000
    with pytest.raises(Unavailable, match=f"stopped after {rpc.CHUNK_BYTES + 1000}"):
        await transfer.download(stub, "chat", 7, tmp_path)
    registry.stops_after_bytes = None
    folder = await transfer.download(stub, "chat", 7, tmp_path)
    assert registry.offsets == [0, rpc.CHUNK_BYTES + 1000]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert is_clean(tmp_path)


async def test_a_download_that_had_everything_but_its_name_fetches_nothing(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    part = tmp_path / f"7-{digest(WEIGHTS)[7:19]}.part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(WEIGHTS)
    assert transfer.is_complete(await transfer.download(stub, "chat", 7, tmp_path), digest(WEIGHTS))
    assert registry.offsets == []


@pytest.mark.attack(
    boundary="drafts",
    attack="weights with other bytes than the digest says",
    outcome="thrown away before they get their name",
)
async def test_corrupt_bytes_never_get_the_final_name_and_are_thrown_away(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    registry.stored = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
    with pytest.raises(Corrupt, match="weights hash to"):
        await transfer.download(stub, "chat", 7, tmp_path)
    assert is_clean(tmp_path)
    assert not (tmp_path / "7").exists()
    registry.stored = WEIGHTS
    await transfer.download(stub, "chat", 7, tmp_path)


async def test_a_damaged_folder_is_replaced(registry: Registry, stub: RegistryAsyncStub, tmp_path: Path) -> None:
    folder = await transfer.download(stub, "chat", 7, tmp_path)
    (folder / "model.safetensors").write_bytes(WEIGHTS[:1000])
    await transfer.download(stub, "chat", 7, tmp_path, digest=digest(WEIGHTS))
    assert transfer.is_complete(folder, digest(WEIGHTS))


async def test_a_version_number_of_a_registry_that_started_over_replaces_the_old_folder(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    await transfer.download(stub, "chat", 7, tmp_path)
    registry.stored, registry.manifest = b"new", manifest(b"new")
    folder = await transfer.download(stub, "chat", 7, tmp_path)
    assert (folder / "model.safetensors").read_bytes() == b"new"


@pytest.mark.attack(
    boundary="drafts",
    attack="a registry that sends more, less or something else than it announced",
    outcome="refused",
)
@pytest.mark.parametrize("damage", ["skips", "delta", "too long", "other digest"])
async def test_a_registry_that_sends_something_else_is_corrupt(
    damage: str, registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    match damage:
        case "skips":
            registry.skips_bytes = 10
        case "delta":
            registry.encoding = pb.ENCODING_DELTA_ZSTD
        case "too long":
            registry.stored = WEIGHTS + b"more"
        case "other digest":
            registry.stored = bytes(len(WEIGHTS))
    with pytest.raises(Corrupt):
        await transfer.download(stub, "chat", 7, tmp_path)
    assert not (tmp_path / "7").exists()


async def test_two_downloads_of_one_version_do_not_mix(stub: RegistryAsyncStub, tmp_path: Path) -> None:
    part = tmp_path / f"7-{digest(WEIGHTS)[7:19]}.part" / "model.safetensors"
    with partial_download._exclusive(part), pytest.raises(Unavailable, match="another process"):
        await transfer.download(stub, "chat", 7, tmp_path)
    assert transfer.is_complete(await transfer.download(stub, "chat", 7, tmp_path), digest(WEIGHTS))


async def test_a_full_disk_is_exhausted(stub: RegistryAsyncStub, tmp_path: Path) -> None:
    part = tmp_path / f"7-{digest(WEIGHTS)[7:19]}.part"
    part.mkdir()
    (part / "model.safetensors").symlink_to("/dev/full")  # fails as a full disk does
    with pytest.raises(Exhausted, match="no space left"):
        await transfer.download(stub, "chat", 7, tmp_path)
    assert not (tmp_path / "7").exists()
