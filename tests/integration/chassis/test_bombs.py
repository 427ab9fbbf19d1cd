"""Messages that are small on the wire and large in memory: the registry refuses them, and its memory does not grow by them."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest
from tests.support.checkpoints import draft
from tests.support.registry import CALL_S, RegistryProcess, client, publish, registry_stub

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.errors import Exhausted, InvalidInput, UpdraftError

MIB = 1024**2
BOMB_BYTES = 96 * MIB
"""Of zeros, which gzip makes a thousand times smaller: below the limit of a message."""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[RegistryProcess]:
    with RegistryProcess(tmp_path) as registry:
        yield registry


def peak_bytes(process: RegistryProcess) -> int:
    """The most memory that the process ever had."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@asynccontextmanager
async def compressing(address: str, algorithm: grpc.Compression) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options, compression=algorithm) as channel:
        yield channel


@pytest.mark.attack(
    boundary="registry",
    attack="a gzip or deflate bomb of 96 MiB in a message of 100 KiB",
    outcome="refused before it is unpacked; memory does not grow",
)
@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_compressed_message_is_refused_before_it_is_unpacked(
    process: RegistryProcess, algorithm: grpc.Compression
) -> None:
    async with client(process.address) as stub:
        await publish(stub, draft(1))  # what a first call needs
        before = peak_bytes(process)
        async with compressing(process.address, algorithm) as channel:
            bomb = pb.PinRequest(speculator="default", version=1, reason="\0" * BOMB_BYTES)
            with pytest.raises(UpdraftError), rpc.errors():
                await registry_stub(channel).Pin(bomb, timeout=CALL_S)
        assert peak_bytes(process) - before < BOMB_BYTES / 3
        assert (await publish(stub, draft(2))).version.version == 2


def empty_messages(field: int, num_bytes: int) -> bytes:
    """A repeated field of empty messages, two bytes each."""
    return bytes([field << 3 | 2, 0]) * (num_bytes // 2)


NESTED = b"\x7b" * 10_000 + b"\x7c" * 10_000
"""Groups of an unknown field, one within the other."""

REPORT_BOMB = fleet_pb2.PodReport.VERSIONS_FIELD_NUMBER
MANIFEST_BOMB = pb.Manifest.TENSORS_FIELD_NUMBER


def wrapped(field: int, content: bytes) -> bytes:
    """A message that has this one in a field."""
    length, prefix = len(content), [field << 3 | 2]
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*prefix, length]) + content


@pytest.mark.attack(
    boundary="registry",
    attack="a protobuf bomb: a report or manifest of a million empty messages",
    outcome="refused in a sentence; its memory is bounded by that of one message and freed",
)
@pytest.mark.parametrize(
    ("method", "data", "error"),
    [
        pytest.param(
            "/updraft.fleet.v1.Fleet/Connect",
            wrapped(1, empty_messages(REPORT_BOMB, 2 * MIB)),
            InvalidInput,
            id="report",
        ),
        pytest.param(
            "/updraft.registry.v1.Registry/Publish",
            wrapped(1, empty_messages(MANIFEST_BOMB, 2 * MIB)),
            (InvalidInput, Exhausted),
            id="manifest",
        ),
    ],
)
async def test_a_million_empty_messages_are_refused(
    process: RegistryProcess, method: str, data: bytes, error: type[UpdraftError] | tuple[type[UpdraftError], ...]
) -> None:
    async with client(process.address) as stub, rpc.channel(process.address) as channel:
        await publish(stub, draft(1))
        for _ in range(3):
            with pytest.raises(error), rpc.errors():
                await sent(channel, method, data)
        before = psutil.Process(process.pid).memory_info().rss
        for _ in range(10):
            with pytest.raises(error), rpc.errors():
                await sent(channel, method, data)
        assert psutil.Process(process.pid).memory_info().rss - before < 128 * MIB
        assert (await publish(stub, draft(2))).version.version == 2


async def sent(channel: grpc.aio.Channel, method: str, data: bytes) -> None:
    """One message as bytes, to a method that takes a stream; raises what it is answered with."""
    if method.endswith("Connect"):
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(method)(timeout=CALL_S)
        await call.write(data)
        while await call.read() is not grpc.aio.EOF:
            pass
    else:
        publish_bytes: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(method)
        await publish_bytes(iter([data]), timeout=CALL_S)


@pytest.mark.attack(
    boundary="registry",
    attack="a message of ten thousand nested groups",
    outcome="the call ends; all others go on",
)
async def test_a_message_that_is_nested_too_deep_ends_its_call_only(process: RegistryProcess) -> None:
    async with client(process.address) as stub, rpc.channel(process.address) as channel:
        deep: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/updraft.registry.v1.Registry/SetPolicy"
        )
        with pytest.raises(UpdraftError), rpc.errors():
            await deep(NESTED, timeout=CALL_S)
        assert (await publish(stub, draft(1))).version.version == 1
