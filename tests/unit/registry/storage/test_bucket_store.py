"""Blobs and documents in a bucket, here one in memory; a real one is in tests/integration/registry/test_bucket.py."""

from pathlib import Path

import obstore
import pytest
from obstore.store import MemoryStore
from tests.contract.store_contract import DATA, DIGEST, StoreContract, put, read, sealed

from updraft_chassis.errors import Corrupt, InvalidInput
from updraft_registry.storage.stores.bucket import Bucket, BucketStore, open_bucket

BLOB = f"blobs/sha256/{DIGEST.removeprefix('sha256:')}"


@pytest.fixture
def objects() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def store(objects: MemoryStore, tmp_path: Path) -> BucketStore:
    return opened(objects, tmp_path)


def opened(objects: MemoryStore, folder: Path, *, cache_bytes: int = 10**6) -> BucketStore:
    return BucketStore(Bucket(url="memory://", objects=objects, quick=objects), folder, cache_bytes=cache_bytes)


class TestBucketStore(StoreContract):
    pass


def test_a_blob_outlives_the_local_disk(objects: MemoryStore, tmp_path: Path) -> None:
    put(opened(objects, tmp_path / "one"))
    assert read(opened(objects, tmp_path / "two")) == DATA


def test_a_blob_is_fetched_once_and_then_read_here(store: BucketStore, objects: MemoryStore) -> None:
    put(store)
    objects.delete(BLOB)
    assert read(store) == DATA


def test_the_local_copies_are_bounded_and_come_back_when_asked_for(objects: MemoryStore, tmp_path: Path) -> None:
    store = opened(objects, tmp_path, cache_bytes=1500)
    digests = [put(store, bytes([i]) * 1000) for i in range(3)]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 1500
    assert [read(store, digest)[0] for digest in digests] == [0, 1, 2]
    assert store.digests() == set(digests)


def test_a_large_blob_arrives_in_parts(objects: MemoryStore, tmp_path: Path) -> None:
    data = bytes(range(256)) * 80_000
    digest = put(opened(objects, tmp_path / "one"), data)
    assert read(opened(objects, tmp_path / "two"), digest) == data


def test_a_blob_that_changed_in_the_bucket_is_corrupt(objects: MemoryStore, store: BucketStore) -> None:
    obstore.put(objects, BLOB, b"something else")
    with pytest.raises(Corrupt, match=f"the blob {DIGEST} in memory:// hashes to"):
        store.open(DIGEST)
    with pytest.raises(Corrupt):
        store.open(DIGEST)


def test_a_blob_whose_upload_was_given_up_is_found_again_so_that_it_can_be_swept(store: BucketStore) -> None:
    upload = sealed(store)
    store.prepare(upload, DIGEST)
    upload.discard()
    assert store.digests() == {DIGEST}
    store.delete(DIGEST)
    assert store.digests() == frozenset()


def test_objects_of_others_are_no_documents(objects: MemoryStore, store: BucketStore) -> None:
    for path in (
        "versions/default/notes.txt",
        "versions/default/old/1.json",
        "versions/1.json",
        "other/default/1.json",
    ):
        obstore.put(objects, path, b"{}")
    assert list(store.documents()) == []


@pytest.mark.parametrize("url", ["memory://", "file:///tmp/x", "https://bucket", "bucket", "s3://", "s3:/bucket"])
def test_what_is_no_bucket_is_refused_with_what_would_be(url: str) -> None:
    with pytest.raises(InvalidInput, match="is not a bucket URL: expected s3://"):
        open_bucket(url)


def test_a_blob_that_was_swept_between_its_upload_and_its_commit_is_put_again(
    objects: MemoryStore, store: BucketStore, tmp_path: Path
) -> None:
    upload = sealed(store)
    store.prepare(upload, DIGEST)
    store.delete(DIGEST)
    store.commit(upload, DIGEST)
    assert store.digests() == {DIGEST}
    assert read(opened(objects, tmp_path / "other")) == DATA
