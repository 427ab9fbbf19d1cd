"""What goes wrong: refused with a reason, the old version goes on, nothing is left behind."""

import asyncio
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
from tests.support.checkpoints import BF16_NAN, OTHER_TARGET, TARGET, draft, evaluation
from tests.support.registry import (
    CALL_S,
    PodStream,
    Registry,
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
from updraft_chassis.errors import Corrupt, InvalidInput, NotFound, UpdraftError

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

SIZE = len(draft(2).data)
FLIPPED = draft(2).data[:-40] + bytes([draft(2).data[-40] ^ 4]) + draft(2).data[-39:]
NAN = draft(fc=bytes(1000) + BF16_NAN + bytes(22))


@pytest.mark.attack(
    boundary="registry",
    attack="an upload that is truncated, too long, corrupt, not finite, of another target, or has gaps",
    outcome="refused with the reason; nothing is left on the disk",
)
@pytest.mark.parametrize(
    ("messages", "error", "why"),
    [
        pytest.param(
            lambda: parts(draft(2).manifest(), draft(2).data[:-1]),
            InvalidInput,
            f"the upload ended after {SIZE - 1} bytes, but its manifest states {SIZE}",
            id="truncated",
        ),
        pytest.param(
            lambda: parts(draft(2).manifest(), draft(2).data + b"x"),
            InvalidInput,
            f"more than the {SIZE} bytes of the manifest arrived",
            id="too long",
        ),
        pytest.param(
            lambda: parts(draft(2).manifest(), FLIPPED), Corrupt, "it was corrupted in transit", id="flipped bit"
        ),
        pytest.param(
            lambda: parts(NAN.manifest(), NAN.data),
            InvalidInput,
            "tensor fc.weight holds 1 values that are not finite",
            id="nan",
        ),
        pytest.param(
            lambda: parts(draft(2).manifest(target_fingerprint=OTHER_TARGET), draft(2).data),
            InvalidInput,
            f"the target of this draft is {OTHER_TARGET}, but default is for {TARGET}",
            id="another target",
        ),
        pytest.param(
            lambda: parts(draft(2).manifest(size_bytes=2**40), draft(2).data),
            InvalidInput,
            "this registry accepts 1 to 17179869184",
            id="too large",
        ),
        pytest.param(
            lambda: parts(draft(2).manifest(parent_version=7), draft(2).data),
            NotFound,
            "the parent, version 7, does not exist",
            id="no parent",
        ),
        pytest.param(
            lambda: parts(draft(2).manifest(tensors=draft(3).tensors), draft(2).data),
            InvalidInput,
            "tensor fc.weight is sha256:",
            id="another manifest",
        ),
        pytest.param(
            lambda: iter(()), InvalidInput, "the first message of an upload must be its manifest", id="nothing"
        ),
        pytest.param(
            lambda: list(parts(draft(2).manifest(), draft(2).data))[1:],
            InvalidInput,
            "the first message of an upload must be its manifest",
            id="no manifest",
        ),
        pytest.param(
            lambda: [pb.PublishRequest(manifest=draft(2).manifest())] * 2,
            InvalidInput,
            "after its manifest, an upload consists of chunks",
            id="two manifests",
        ),
        pytest.param(
            lambda: [
                pb.PublishRequest(manifest=draft(2).manifest()),
                pb.PublishRequest(chunk=pb.Chunk(offset=5, data=b"x")),
            ],
            InvalidInput,
            "a chunk at byte 5, expected byte 0",
            id="gap",
        ),
    ],
)
async def test_an_upload_that_is_not_sound_is_refused_and_the_old_version_goes_on(
    registry: Registry, stub: "RegistryAsyncStub", messages: Any, error: type[UpdraftError], why: str
) -> None:
    await publish(stub, draft(1))
    with pytest.raises(error) as refused:
        await send(stub, messages())
    assert why in str(refused.value)
    now = await state(stub)
    assert (now.stable, now.latest) == (1, 1)
    assert files(registry) == {"uploads": 0, "blobs": 1, "versions": 1}
    assert registry.metric(f'updraft_registry_refused_uploads_total{{status="{error.status}"}}') == 1


async def test_a_sender_that_goes_away_in_the_middle_leaves_nothing(
    registry: Registry, channel: grpc.aio.Channel, stub: "RegistryAsyncStub"
) -> None:
    call = stub.Publish(timeout=CALL_S)
    for message in list(parts(draft(1).manifest(), draft(1).data, chunk_bytes=64))[:3]:
        await call.write(message)
    await until(lambda: files(registry)["uploads"] == 1, what="the upload has begun")
    call.cancel()
    await until(lambda: files(registry)["uploads"] == 0, what="the upload is gone")
    assert (await state(stub)).latest == 0
    assert (await publish(stub, draft(1))).version.version == 1


@pytest.mark.attack(
    boundary="registry",
    attack="random bytes to the port and to each kind of method",
    outcome="the call ends; all others go on",
)
async def test_bytes_that_are_no_message_end_their_call_only(
    registry: Registry, channel: grpc.aio.Channel, stub: "RegistryAsyncStub"
) -> None:
    rubbish = b"\xff" * 300
    with socket.create_connection(("127.0.0.1", registry.port)) as plain:
        plain.sendall(rubbish * 100)
    stream: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream("/updraft.fleet.v1.Fleet/Connect")()
    with pytest.raises(grpc.aio.AioRpcError):
        await _exchange(stream, rubbish)
    for method in ("Get", "List", "Pin", "SetPolicy", "History"):
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
        call = channel.unary_unary(f"/updraft.registry.v1.Registry/{method}")
        with pytest.raises(grpc.aio.AioRpcError):
            await call(rubbish, timeout=CALL_S)
    assert (await publish(stub, draft(1))).version.version == 1


async def test_a_registry_that_is_killed_in_the_middle_of_an_upload_forgets_it_and_serves_the_old_version(
    process: RegistryProcess,
) -> None:
    async with rpc.channel(process.address) as channel:
        stub = registry_stub(channel)
        await publish(stub, draft(1))
        call = stub.Publish(timeout=CALL_S)
        for message in list(parts(draft(2).manifest(), draft(2).data, chunk_bytes=64))[:5]:
            await call.write(message)
        await until(lambda: files(process)["uploads"] == 1, what="the upload has begun")
        process.kill()
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        process.start()
        await found_again(channel)
        now = await state(stub)
        assert (now.stable, now.latest) == (1, 1)
        assert await fetch(stub, 1) == draft(1).data
        assert files(process) == {"uploads": 0, "blobs": 1, "versions": 1}
        second = await publish(stub, draft(2), source=pb.SOURCE_TRAINER, evaluation=evaluation(baseline=1))
        assert (second.version.version, second.version.phase) == (2, pb.PHASE_STABLE)


async def test_a_registry_that_is_killed_while_many_publish_keeps_every_answered_version(
    process: RegistryProcess,
) -> None:
    async with rpc.channel(process.address) as channel:
        stub = registry_stub(channel)
        answered: dict[int, str] = {}
        for round_ in range(4):
            async with asyncio.TaskGroup() as tasks:
                senders = [tasks.create_task(_publish_on(stub, round_ * 100 + i, answered)) for i in range(3)]
                await until(lambda: len(answered) > 3 * round_, what="a version was published")  # noqa: B023 - awaited here
                process.kill()
                for sender in senders:
                    sender.cancel()
            process.start()
            await found_again(channel)
            listed = await stub.List(pb.ListRequest(speculator="default", page_size=1000, full=True), timeout=CALL_S)
            known = {version.version: version.manifest.digest for version in listed.versions}
            assert sorted(known) == list(range(1, len(known) + 1)), "numbers have no gaps"
            assert answered.items() <= known.items(), "what was answered is there"
            assert [v.phase for v in listed.versions].count(pb.PHASE_STABLE) == 1
            assert files(process)["uploads"] == 0
            answered.update(known)


async def _exchange(stream: "grpc.aio.StreamStreamCall[bytes, bytes]", message: bytes) -> None:
    await stream.write(message)
    await stream.read()


async def _publish_on(stub: "RegistryAsyncStub", seed: int, answered: dict[int, str]) -> None:
    """Publish one version after another, until cancelled or cut off."""
    for i in range(1000):
        weights = draft(seed + 10_000 * i)
        try:
            published = await publish(stub, weights, source=pb.SOURCE_TRAINER, evaluation=evaluation())
        except UpdraftError:
            return
        answered[published.version.version] = weights.digest


async def test_a_restart_under_a_connected_pod_changes_nothing(process: RegistryProcess) -> None:
    loaded = (2, draft(2).manifest().tensors_digest)
    async with rpc.channel(process.address) as channel:
        stub = registry_stub(channel)
        await publish(stub, draft(1))
        await publish(stub, draft(2), source=pb.SOURCE_TRAINER, evaluation=evaluation(baseline=1))
        pod = PodStream(channel)
        await pod.report()
        before = await pod.receive()
        await pod.answer(fleet_pb2.OUTCOME_ACK, loaded=loaded)
        history = (await stub.History(pb.HistoryRequest(speculator="default"), timeout=CALL_S)).transitions
        process.kill()
        with pytest.raises((grpc.aio.AioRpcError, UpdraftError)):
            await pod.receive()
        process.start()
        await found_again(channel)
        again = PodStream(channel)
        await again.report(
            loaded=loaded, status=fleet_pb2.DirectiveStatus(nonce=before.nonce, outcome=fleet_pb2.OUTCOME_ACK)
        )
        assert await again.receive() == before, "the same directive with the same nonce: nothing to do"
        await until(lambda: _serving(stub, 1), what="the pod is back")
        now = (await stub.History(pb.HistoryRequest(speculator="default"), timeout=CALL_S)).transitions
        assert list(now) == list(history)
        await stub.Pin(pb.PinRequest(speculator="default", version=1), timeout=CALL_S)
        assert (await again.receive()).serve_version == 1, "and this is the next thing that the pod hears"
        await again.end()


async def test_pins_and_pauses_survive_a_kill(process: RegistryProcess) -> None:
    async with rpc.channel(process.address) as channel:
        stub = registry_stub(channel)
        await publish(stub, draft(1))
        await stub.Pin(pb.PinRequest(speculator="default", version=0, reason="slow"), timeout=CALL_S)
        await stub.Pause(pb.PauseRequest(speculator="default"), timeout=CALL_S)
        before = await state(stub)
        process.kill()
        process.start()
        await found_again(channel)
        assert await state(stub) == before


async def test_a_stop_ends_streams_and_watches_at_once(process: RegistryProcess) -> None:
    async with rpc.channel(process.address) as channel:
        stub = registry_stub(channel)
        pod, watch = PodStream(channel), stub.Watch(pb.WatchRequest(speculator="default"))
        await pod.report()
        await pod.receive()
        await anext(aiter(watch))
        assert await asyncio.to_thread(process.terminate) == 0
        with pytest.raises(UpdraftError, match="the registry is shutting down"):
            await pod.receive()
        async for _ in watch:
            pass
        assert await watch.code() is grpc.StatusCode.OK
    assert '"level": "ERROR"' not in process.log
    assert "Traceback" not in process.log


@pytest.mark.parametrize("setting", ["port", "metrics_port"])
def test_a_port_that_is_taken_is_one_sentence(process: RegistryProcess, tmp_path: Path, setting: str) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    second = RegistryProcess(folder, **{setting: getattr(process, setting)})
    second.spawn()
    assert second.wait() == 1
    assert second.log.splitlines()[-1].startswith(
        f"updraft-registry: cannot listen on 127.0.0.1:{getattr(process, setting)}"
    )
    assert f"UPDRAFT_REGISTRY_{setting.upper()}" in second.log


def test_a_registry_takes_as_many_files_as_it_may_for_every_pod_is_a_connection(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
    try:
        with RegistryProcess(tmp_path) as process:
            assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_second_registry_on_the_same_folder_is_one_sentence(process: RegistryProcess, tmp_path: Path) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    second = RegistryProcess(folder, data_dir=process.data)
    second.spawn()
    assert second.wait() == 1
    assert second.log == (
        f"updraft-registry: another registry uses {process.data}; stop it or set another UPDRAFT_REGISTRY_DATA_DIR\n"
    )


def test_a_damaged_catalogue_is_one_sentence_and_rebuilt_by_the_command_that_it_names(process: RegistryProcess) -> None:
    async def put() -> None:
        async with rpc.channel(process.address) as channel:
            await publish(registry_stub(channel), draft(1))

    async def look() -> pb.SpeculatorState:
        async with rpc.channel(process.address) as channel:
            return await state(registry_stub(channel))

    asyncio.run(put())
    process.kill()
    for path in process.data.glob("catalogue.sqlite3-*"):
        path.unlink()
    (process.data / "catalogue.sqlite3").write_bytes(b"\xff" * 8192)
    process.spawn()
    assert process.wait() == 1
    assert "run `updraft registry rebuild`" in process.log.splitlines()[-1]
    command = [sys.executable, "-m", "updraft_registry", "rebuild", "--data-dir", str(process.data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 version; no damage" in done.stdout
    process.start()
    busy = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (busy.returncode, busy.stdout) == (1, "")
    assert busy.stderr.startswith("updraft-registry rebuild: another registry uses")
    assert asyncio.run(look()).stable == 1


def files(registry: Registry) -> dict[str, int]:
    """How many files there are of each kind."""
    return {
        folder: sum(path.is_file() for path in (registry.data / folder).rglob("*"))
        for folder in ("uploads", "blobs", "versions")
    }


async def _serving(stub: "RegistryAsyncStub", count: int) -> bool:
    return (await state(stub)).pods.serving_stable == count
