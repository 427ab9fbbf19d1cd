"""Weights by a delta to what is here, or from a bucket: fewer bytes, and never other ones. What fails costs one attempt."""

from __future__ import annotations

import io
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.checkpoints import Checkpoint, draft
from tests.support.rpc import service, serving

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_artifacts import delta, fetch, ranged_download, transfer
from updraft_chassis.errors import Exhausted, InvalidInput, NotFound, Unavailable

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

CHUNK = 4096
VERSIONS = {number: draft(number, columns=4096) for number in (1, 2, 3)}
SIZE = len(VERSIONS[3].data)


def delta_between(base: int, result: int) -> bytes:
    out = io.BytesIO()
    delta.encode(io.BytesIO(VERSIONS[base].data), io.BytesIO(VERSIONS[result].data), out)
    return out.getvalue()


@dataclass
class Registry:
    """Three versions, each the parent of the next; the attributes say how it answers a Fetch."""

    has_deltas: bool = True
    address: str = ""
    damage: bytes = b""
    stops_after_bytes: int = 10**9
    waits: int = 0
    asked: list[pb.FetchRequest] = field(default_factory=list)
    sent_bytes: int = 0

    async def get(self, request: pb.GetRequest, context: Any) -> pb.GetResponse:
        if request.version not in VERSIONS:
            raise NotFound("no such version")
        manifest = VERSIONS[request.version].manifest("chat", parent_version=request.version - 1)
        return pb.GetResponse(version=pb.Version(version=request.version, manifest=manifest))

    async def fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.FetchResponse]:
        self.asked.append(request)
        wanted = VERSIONS[request.version]
        for _ in range(self.waits):
            yield pb.FetchResponse(chunk=pb.Chunk(offset=request.offset))
        if self.address and request.accept_redirect:
            yield _start(wanted, pb.ENCODING_IDENTITY, len(wanted.data), self.address)
            return
        base = VERSIONS.get(request.delta_base_version)
        is_delta = self.has_deltas and base is not None and base.digest == request.delta_base_digest
        data = delta_between(request.delta_base_version, request.version) if is_delta else wanted.data
        data = data[: len(data) - len(self.damage)] + self.damage if is_delta else data
        if request.offset > len(data):
            raise InvalidInput("behind the end")
        yield _start(wanted, pb.ENCODING_DELTA_ZSTD if is_delta else pb.ENCODING_IDENTITY, len(data))
        end = min(len(data), self.stops_after_bytes)
        for offset in range(request.offset, end, CHUNK):
            chunk = data[offset : min(offset + CHUNK, end)]
            self.sent_bytes += len(chunk)
            yield pb.FetchResponse(chunk=pb.Chunk(offset=offset, data=chunk))


def _start(wanted: Checkpoint, encoding: pb.Encoding.ValueType, size_bytes: int, address: str = "") -> pb.FetchResponse:
    return pb.FetchResponse(
        start=pb.FetchResponse.Start(
            encoding=encoding, size_bytes=size_bytes, digest=wanted.digest, redirect_uri=address
        )
    )


class Bucket:
    """An HTTP server that gives the range of `data` that is asked for, or answers with `status`."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.more = b""
        self.status = 0
        self.stops_after_bytes = self.most_bytes = 10**9
        self.may_end = threading.Event()
        self.may_end.set()
        self.ranges: list[str] = []
        bucket = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers["Range"]
                bucket.ranges.append(wanted)
                begin, end = map(int, wanted.removeprefix("bytes=").split("-"))
                range_ = bucket.data[begin : end + 1] + bucket.more
                self.send_response(bucket.status or 206)
                self.send_header("Content-Length", str(len(range_)))
                self.end_headers()
                self.wfile.write(range_[: max(0, min(bucket.most_bytes, bucket.stops_after_bytes - begin))])
                bucket.may_end.wait()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/drafts/3?signature=secret"


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    started = Bucket(VERSIONS[3].data)
    thread = threading.Thread(target=started.server.serve_forever, args=(0.01,))
    thread.start()
    yield started
    started.may_end.set()
    started.server.shutdown()
    started.server.server_close()
    thread.join()


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
async def stub(registry: Registry) -> AsyncIterator[RegistryAsyncStub]:
    methods = service(pb.DESCRIPTOR.services_by_name["Registry"], Get=registry.get, Fetch=registry.fetch)
    async with serving(methods) as channel:
        yield RegistryStub(channel)


async def hold(stub: RegistryAsyncStub, folder: Path, *versions: int) -> None:
    for version in versions:
        await transfer.download(stub, "chat", version, folder)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def bases(registry: Registry) -> list[int]:
    return [request.delta_base_version for request in registry.asked]


async def test_a_version_comes_as_a_delta_to_its_parent(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    await hold(stub, tmp_path, 1, 2)
    registry.sent_bytes = 0
    folder = await transfer.download(stub, "chat", 3, tmp_path)
    assert weights(folder) == VERSIONS[3].data
    assert bases(registry) == [0, 1, 2]
    assert registry.sent_bytes == len(delta_between(2, 3))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]


async def test_without_the_parent_the_base_is_the_newest_that_is_here(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    await hold(stub, tmp_path, 1)
    assert weights(await transfer.download(stub, "chat", 3, tmp_path)) == VERSIONS[3].data
    assert bases(registry) == [0, 1]


async def test_the_caller_may_name_the_base(registry: Registry, stub: RegistryAsyncStub, tmp_path: Path) -> None:
    await hold(stub, tmp_path, 1, 2)
    await transfer.download(stub, "chat", 3, tmp_path, base=1)
    assert bases(registry)[-1] == 1


async def test_a_version_can_come_as_a_delta_to_a_newer_one(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    await hold(stub, tmp_path, 2, 1)
    assert weights(tmp_path / "1") == VERSIONS[1].data
    assert bases(registry) == [0, 2]


async def test_a_version_of_another_speculator_or_size_is_no_base(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    await hold(stub, tmp_path, 1, 2)
    with (tmp_path / "2" / "model.safetensors").open("ab") as file:
        file.write(b"more")
    path = tmp_path / "1" / "manifest.json"
    path.write_text(path.read_text().replace('"chat"', '"other"'))
    await transfer.download(stub, "chat", 3, tmp_path)
    assert not registry.asked[-1].HasField("delta_base_version")


async def test_a_registry_without_a_delta_sends_the_whole(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    registry.has_deltas = False
    await hold(stub, tmp_path, 1, 2)
    assert weights(tmp_path / "2") == VERSIONS[2].data
    assert len(registry.asked) == 2


async def test_a_delta_that_breaks_off_is_resumed(registry: Registry, stub: RegistryAsyncStub, tmp_path: Path) -> None:
    await hold(stub, tmp_path, 1)
    registry.stops_after_bytes = CHUNK + 100
    with pytest.raises(Unavailable, match=f"stopped after {CHUNK + 100}"):
        await transfer.download(stub, "chat", 2, tmp_path)
    registry.stops_after_bytes = 10**9
    assert weights(await transfer.download(stub, "chat", 2, tmp_path)) == VERSIONS[2].data
    assert [request.offset for request in registry.asked] == [0, 0, CHUNK + 100]


async def test_a_delta_that_is_no_longer_there_is_replaced_by_the_whole(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    await hold(stub, tmp_path, 1)
    registry.stops_after_bytes = CHUNK
    with pytest.raises(Unavailable):
        await transfer.download(stub, "chat", 2, tmp_path)
    registry.stops_after_bytes, registry.has_deltas = 10**9, False
    assert weights(await transfer.download(stub, "chat", 2, tmp_path)) == VERSIONS[2].data
    assert [request.offset for request in registry.asked] == [0, 0, CHUNK, 0]


async def test_a_delta_that_became_shorter_is_replaced_by_the_whole(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    await hold(stub, tmp_path, 1)
    part = tmp_path / f"2-{VERSIONS[2].digest[7:19]}.part"
    part.mkdir()
    (part / "1.delta").write_bytes(bytes(len(delta_between(1, 2)) + 1))
    assert weights(await transfer.download(stub, "chat", 2, tmp_path)) == VERSIONS[2].data
    assert bases(registry) == [0, 1, 0]


async def test_a_corrupt_delta_is_replaced_by_the_whole(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    await hold(stub, tmp_path, 1)
    registry.damage = b"damaged"
    assert weights(await transfer.download(stub, "chat", 2, tmp_path)) == VERSIONS[2].data
    assert bases(registry) == [0, 1, 0]


async def test_a_base_that_is_damaged_here_is_found_out_and_the_whole_is_fetched(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    await hold(stub, tmp_path, 1)
    path = tmp_path / "1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] + bytes(1000))
    assert weights(await transfer.download(stub, "chat", 2, tmp_path)) == VERSIONS[2].data
    assert bases(registry) == [0, 1, 0]


async def test_empty_chunks_only_say_that_it_takes_a_while(
    registry: Registry, stub: RegistryAsyncStub, tmp_path: Path
) -> None:
    registry.waits = 3
    await hold(stub, tmp_path, 1, 2)
    assert weights(tmp_path / "2") == VERSIONS[2].data


async def test_a_bucket_gives_what_the_registry_points_to(
    registry: Registry, stub: RegistryAsyncStub, bucket: Bucket, tmp_path: Path
) -> None:
    registry.address = bucket.address
    assert weights(await transfer.download(stub, "chat", 3, tmp_path)) == VERSIONS[3].data
    assert (registry.sent_bytes, bucket.ranges) == (0, [f"bytes=0-{SIZE - 1}"])


async def test_who_may_not_go_to_the_bucket_is_served_by_the_registry(
    registry: Registry, stub: RegistryAsyncStub, bucket: Bucket, tmp_path: Path
) -> None:
    registry.address = bucket.address
    await transfer.download(stub, "chat", 3, tmp_path, accept_redirect=False)
    assert (registry.sent_bytes, bucket.ranges) == (len(VERSIONS[3].data), [])


async def test_several_ranges_are_fetched_at_a_time_and_arrive_in_order(
    registry: Registry,
    stub: RegistryAsyncStub,
    bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranged_download, "RANGE_BYTES", 10_000)
    registry.address = bucket.address
    assert weights(await transfer.download(stub, "chat", 3, tmp_path)) == VERSIONS[3].data
    begins = range(0, SIZE, 10_000)
    assert sorted(bucket.ranges) == sorted(f"bytes={begin}-{min(begin + 10_000, SIZE) - 1}" for begin in begins)


async def test_a_range_that_breaks_off_goes_on_where_it_stopped(
    registry: Registry, stub: RegistryAsyncStub, bucket: Bucket, tmp_path: Path
) -> None:
    registry.address, bucket.most_bytes = bucket.address, 20_000
    assert weights(await transfer.download(stub, "chat", 3, tmp_path)) == VERSIONS[3].data
    assert bucket.ranges == [f"bytes={begin}-{SIZE - 1}" for begin in range(0, SIZE, 20_000)]
    assert registry.sent_bytes == 0


async def test_a_download_that_was_begun_goes_on_from_the_bucket(
    registry: Registry, stub: RegistryAsyncStub, bucket: Bucket, tmp_path: Path
) -> None:
    registry.stops_after_bytes = CHUNK
    with pytest.raises(Unavailable):
        await transfer.download(stub, "chat", 3, tmp_path)
    registry.address = bucket.address
    assert weights(await transfer.download(stub, "chat", 3, tmp_path)) == VERSIONS[3].data
    assert bucket.ranges == [f"bytes={CHUNK}-{SIZE - 1}"]


@pytest.mark.parametrize("failure", ["forbidden", "elsewhere", "breaks off", "other bytes", "too many", "nobody there"])
async def test_a_bucket_that_does_not_give_the_weights_costs_only_the_attempt(
    failure: str,
    registry: Registry,
    stub: RegistryAsyncStub,
    bucket: Bucket,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry.address = bucket.address
    match failure:
        case "forbidden":
            bucket.status = 403
        case "elsewhere":
            bucket.status = 307
        case "breaks off":
            bucket.stops_after_bytes = 10_000
        case "other bytes":
            bucket.data = bytes(len(bucket.data))
        case "too many":
            bucket.more = b"more"
        case "nobody there":
            registry.address = "http://127.0.0.1:1/?signature=secret"
    assert weights(await transfer.download(stub, "chat", 3, tmp_path)) == VERSIONS[3].data
    assert [request.accept_redirect for request in registry.asked] == [True, False]
    assert "secret" not in caplog.text
    assert registry.asked[1].offset == (10_000 if failure == "breaks off" else registry.asked[1].offset)


async def test_a_disk_that_is_full_for_a_bucket_is_exhausted_too(
    registry: Registry, stub: RegistryAsyncStub, bucket: Bucket, tmp_path: Path
) -> None:
    registry.address = bucket.address
    part = tmp_path / f"3-{VERSIONS[3].digest[7:19]}.part"
    part.mkdir()
    (part / "model.safetensors").symlink_to("/dev/full")  # fails as a full disk does
    with pytest.raises(Exhausted, match="no space left"):
        await transfer.download(stub, "chat", 3, tmp_path)


async def test_a_bucket_that_takes_too_long_is_left_for_the_stream(
    registry: Registry, stub: RegistryAsyncStub, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "GRACE_S", 3.0)  # time enough to connect and to receive them
    registry.address, bucket.stops_after_bytes = bucket.address, 10_000
    bucket.may_end.clear()
    assert weights(await transfer.download(stub, "chat", 3, tmp_path)) == VERSIONS[3].data
    assert [request.accept_redirect for request in registry.asked] == [True, False]
    assert registry.asked[1].offset == 10_000
