"""A registry on a real S3 server: the same contract, and bad days of the bucket."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from tests.contract.store_contract import DATA, DIGEST, StoreContract, put, read
from tests.support.archives import POLICY
from tests.support.checkpoints import draft
from tests.support.clock import ManualClock
from tests.support.registry import CALL_S, Registry, RegistryProcess, client, fetch, publish, running, state
from tests.support.s3_server import MISSING, S3Server
from tests.support.versions import NOW_MS
from tests.support.wait import until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts import transfer
from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_registry.control import DOCUMENTS_RETRY_S, Control
from updraft_registry.fleet import Fleet
from updraft_registry.metrics import Metrics
from updraft_registry.settings import RegistrySettings
from updraft_registry.storage.archive import open_archive
from updraft_registry.storage.maintenance import fsck, open_folder, rebuild
from updraft_registry.storage.stores.bucket import BucketStore, open_bucket

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

BLOB = f"blobs/sha256/{DIGEST.removeprefix('sha256:')}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server of the test's own; its address and keys are in the environment, where obstore looks for them."""
    with S3Server(tmp_path / "s3") as started:
        for name, value in started.environ.items():
            monkeypatch.setenv(name, value)
        yield started


@pytest.fixture
def store(server: S3Server, tmp_path: Path) -> BucketStore:
    return opened(server, tmp_path / "scratch")


@pytest.fixture
async def registry(server: S3Server, tmp_path: Path) -> AsyncIterator[Registry]:
    async with running(tmp_path, store_url=server.url) as started:
        yield started


def opened(server: S3Server, folder: Path, clock: ManualClock | None = None) -> BucketStore:
    return BucketStore(open_bucket(server.url), folder, cache_bytes=10**9, link_for=timedelta(minutes=5), clock=clock)


class TestS3Store(StoreContract):
    pass


def test_blobs_and_documents_have_the_names_that_a_folder_gives_them(store: BucketStore, server: S3Server) -> None:
    put(store)
    store.write_document("default", 1, b"{}")
    assert server.objects() == {f"fleet/{BLOB}", "fleet/versions/default/1.json"}


def test_a_large_blob_goes_and_comes_in_parts(server: S3Server, tmp_path: Path) -> None:
    data = os.urandom(20_000_000)
    digest = put(opened(server, tmp_path / "one"), data)
    assert read(opened(server, tmp_path / "two"), digest) == data


@pytest.mark.attack(
    boundary="drafts",
    attack="a signed bucket address used for another object, or to delete",
    outcome="403",
)
def test_a_signed_address_gives_a_blob_to_anyone_and_nothing_else(store: BucketStore) -> None:
    put(store)
    address = store.link(DIGEST)
    assert address is not None
    assert httpx.get(address).content == DATA
    assert httpx.get(address, headers={"Range": "bytes=990-"}).content == DATA[990:]
    assert httpx.get(address.replace(DIGEST[-8:], "00000000")).status_code == 403
    assert httpx.delete(address).status_code == 403


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "error sending request", id="nobody there"),
        pytest.param({"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch", id="wrong key"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_told_at_the_start_with_what_to_check(
    change: dict[str, str], why: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unavailable) as raised:
        open_bucket(server.url)
    assert f"cannot reach {server.url}: " in str(raised.value)
    assert why in str(raised.value)
    assert "check UPDRAFT_REGISTRY_STORE_URL" in str(raised.value)


def test_a_bucket_that_does_not_exist_is_told_at_the_start(server: S3Server) -> None:
    with pytest.raises(Unavailable, match="NoSuchBucket"):
        open_bucket("s3://other/fleet")


def test_a_bucket_that_is_away_is_unavailable_and_works_again_when_it_is_back(server: S3Server, tmp_path: Path) -> None:
    clock = ManualClock()
    store = opened(server, tmp_path, clock)
    put(store)
    server.kill()
    for call in (
        store.digests,
        lambda: list(store.documents()),
        lambda: store.read_document("default", 1),
        lambda: store.write_document("default", 1, b"{}"),
        lambda: store.delete(DIGEST),
        lambda: put(store, b"another"),
    ):
        with pytest.raises(Unavailable, match=server.url):
            call()
    assert read(store) == DATA, "its copy is here"
    server.start()
    with pytest.raises(Unavailable, match="was unavailable a moment ago"):
        store.digests()
    clock.advance(15.0)
    assert store.digests() == {DIGEST}


def test_an_upload_that_arrives_ends_the_rest_of_a_bucket_that_was_away(server: S3Server, tmp_path: Path) -> None:
    store = opened(server, tmp_path, ManualClock())
    server.kill()
    with pytest.raises(Unavailable):
        store.write_document("default", 1, b"{}")
    server.start()
    put(store)
    store.write_document("default", 1, b"{}")
    assert server.objects() == {f"fleet/{BLOB}", "fleet/versions/default/1.json"}


def test_a_registry_that_cannot_reach_its_bucket_says_so_in_one_sentence(tmp_path: Path, server: S3Server) -> None:
    server.kill()
    process = RegistryProcess(tmp_path, store_url=server.url)
    process.spawn()
    assert process.wait() == 1
    (sentence,) = [line for line in process.log.splitlines() if "cannot reach" in line]
    assert server.url in sentence


async def test_versions_live_in_the_bucket_and_reach_the_pods(
    registry: Registry, server: S3Server, tmp_path: Path
) -> None:
    async with client(registry.address) as stub:
        for seed in (1, 2):
            await publish(stub, draft(seed, columns=4096))
        folder = tmp_path / "pod"
        for version in (1, 2):
            path = await transfer.download(stub, "default", version, folder)
            assert (path / "model.safetensors").read_bytes() == draft(version, columns=4096).data
    assert {key for key in server.objects() if "/blobs/" in key} == {
        f"fleet/blobs/sha256/{draft(seed, columns=4096).digest[7:]}" for seed in (1, 2)
    }
    assert "fleet/versions/default/2.json" in server.objects()
    assert not list((tmp_path / "registry").glob("blobs/sha256/*"))


async def test_a_registry_that_lost_its_disk_comes_back_from_the_bucket(server: S3Server, tmp_path: Path) -> None:
    async with running(tmp_path / "one", store_url=server.url) as first, client(first.address) as stub:
        for seed in (1, 2):
            await publish(stub, draft(seed))
        before = await state(stub)
    async with running(tmp_path / "two", store_url=server.url) as second, client(second.address) as stub:
        after = await state(stub)
        assert (after.stable, after.latest) == (before.stable, before.latest)
        assert await fetch(stub, after.stable) == draft(after.stable).data


async def test_pods_fetch_from_the_bucket_itself_if_they_are_sent_there(server: S3Server, tmp_path: Path) -> None:
    async with (
        running(tmp_path, store_url=server.url, store_redirect=True) as registry,
        client(registry.address) as stub,
    ):
        await publish(stub, draft(1))
        path = await transfer.download(stub, "default", 1, tmp_path / "pod")
        assert (path / "model.safetensors").read_bytes() == draft(1).data
        assert registry.metric('updraft_registry_fetches_total{answer="redirect"}') == 1
        assert registry.metric('updraft_registry_fetched_bytes_total{encoding="identity"}') == 0
        server.kill()
        path = await transfer.download(stub, "default", 1, tmp_path / "other-pod")
        assert (path / "model.safetensors").read_bytes() == draft(1).data


async def test_while_the_bucket_is_away_nothing_is_published_and_nothing_is_lost(
    registry: Registry, server: S3Server, tmp_path: Path
) -> None:
    async with client(registry.address) as stub:
        await publish(stub, draft(1))
        server.kill()
        with pytest.raises(Unavailable, match="cannot write"):
            await publish(stub, draft(2))
        assert (await state(stub)).latest == 1
        assert await fetch(stub, 1) == draft(1).data
        server.start()
        with pytest.raises(InvalidInput):
            await publish(stub, draft(2), target_fingerprint="another")
        assert (await publish(stub, draft(2))).version.version == 2
    assert not list((tmp_path / "registry" / "bucket" / "uploads").iterdir())


async def test_documents_that_the_bucket_missed_follow_once_it_is_back(server: S3Server, tmp_path: Path) -> None:
    clock = ManualClock()

    def store(folder: Path) -> BucketStore:
        return BucketStore(open_bucket(server.url), folder, cache_bytes=0, clock=clock)

    with open_archive(tmp_path / "data", defaults=POLICY, max_draft_bytes=10**6, store=store) as archive:
        server.kill()
        archive.set_policy("default", pb.RolloutPolicy(), NOW_MS)
        server.start()
        archive.write_stale_documents()
        assert server.objects() == set(), "a bucket that was unavailable a moment ago is left alone"
        control = Control(archive, Fleet(), clock, Metrics(CollectorRegistry()))
        clock.advance(DOCUMENTS_RETRY_S)
        async with asyncio.TaskGroup() as tasks:
            deciding = tasks.create_task(control.run())
            await until(lambda: server.objects() == {"fleet/versions/default/0.json"}, what="the document is there")
            deciding.cancel()
        control.join()


async def test_fsck_reads_what_is_in_the_bucket_and_not_the_copies_here(server: S3Server, tmp_path: Path) -> None:
    async with running(tmp_path, store_url=server.url) as registry, client(registry.address) as stub:
        await publish(stub, draft(1))
    config = RegistrySettings(data_dir=registry.data, store_url=server.url)
    blob = server.bucket / "fleet" / "blobs" / "sha256" / draft(1).digest.removeprefix("sha256:")
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with open_folder(config, ManualClock()) as folder:
        outcome = fsck(folder, is_repairing=False, is_hashing=True, progress=lambda _done, _total: None)
        assert [finding.subject for finding in outcome.found] == [draft(1).digest, "default/1"]
    blob.write_bytes(whole)
    with open_folder(config, ManualClock()) as folder:
        outcome = fsck(folder, is_repairing=False, is_hashing=True, progress=lambda _done, _total: None)
        assert outcome.found == ()
    assert {path.name for path in registry.data.iterdir()} >= {"bucket", "catalogue.sqlite3", "lock"}


async def test_a_catalogue_is_rebuilt_on_a_new_machine_from_the_bucket_alone(server: S3Server, tmp_path: Path) -> None:
    async with running(tmp_path / "one", store_url=server.url) as first, client(first.address) as stub:
        await publish(stub, draft(1))
        await stub.Pin(pb.PinRequest(speculator="default", version=0, reason="none today"), timeout=CALL_S)
        before = await stub.History(pb.HistoryRequest(speculator="default"), timeout=CALL_S)
    config = RegistrySettings(data_dir=tmp_path / "two", store_url=server.url)
    with open_folder(config, ManualClock()) as folder:
        rebuild(folder)
    async with (
        running(tmp_path, data_dir=config.data_dir, store_url=server.url) as second,
        client(second.address) as stub,
    ):
        assert (await state(stub)).pin_reason == "none today"
        assert await stub.History(pb.HistoryRequest(speculator="default"), timeout=CALL_S) == before
