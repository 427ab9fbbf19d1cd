"""Blobs in a folder: whole and verified, or not there."""

from pathlib import Path

import pytest
from tests.support.checkpoints import sha256

from updraft_chassis.errors import Corrupt, Exhausted, InvalidInput, NotFound
from updraft_registry.stores.folder import FolderStore

DATA = b"0123456789" * 100
DIGEST = sha256(DATA)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def put(store: FolderStore, data: bytes = DATA) -> str:
    upload = store.begin(len(data))
    upload.write(0, data)
    upload.seal(sha256(data))
    store.commit(upload, sha256(data))
    return sha256(data)


def test_a_committed_upload_is_read_back_under_its_digest(store: FolderStore) -> None:
    digest = put(store)
    with store.open(digest) as file:
        assert file.read() == DATA
    assert store.digests() == {digest}


def test_an_upload_is_nowhere_before_it_is_committed(store: FolderStore) -> None:
    upload = store.begin(len(DATA))
    upload.write(0, DATA)
    upload.seal(DIGEST)
    assert store.digests() == frozenset()
    upload.discard()
    assert not upload.path.exists()


def test_discarding_what_was_committed_deletes_nothing(store: FolderStore) -> None:
    upload = store.begin(len(DATA))
    upload.write(0, DATA)
    upload.seal(DIGEST)
    store.commit(upload, DIGEST)
    upload.discard()
    upload.discard()
    assert store.digests() == {DIGEST}


def test_a_truncated_upload_is_refused_with_both_sizes(store: FolderStore) -> None:
    upload = store.begin(len(DATA))
    upload.write(0, DATA[:-1])
    with pytest.raises(InvalidInput, match="ended after 999 bytes, its manifest says 1000"):
        upload.seal(DIGEST)
    upload.discard()


def test_a_flipped_bit_is_corrupt(store: FolderStore) -> None:
    upload = store.begin(len(DATA))
    upload.write(0, bytes([DATA[0] ^ 1]) + DATA[1:])
    with pytest.raises(Corrupt, match=f"its manifest says {DIGEST}"):
        upload.seal(DIGEST)
    upload.discard()


def test_chunks_that_leave_a_gap_or_repeat_are_refused(store: FolderStore) -> None:
    upload = store.begin(len(DATA))
    upload.write(0, DATA[:10])
    for offset in (0, 20):
        with pytest.raises(InvalidInput, match=f"a chunk at byte {offset}, expected byte 10"):
            upload.write(offset, b"x")
    upload.discard()


def test_more_than_was_announced_is_refused_before_it_is_written(store: FolderStore) -> None:
    upload = store.begin(4)
    with pytest.raises(InvalidInput, match="more than the 4 bytes"):
        upload.write(0, b"12345")
    upload.discard()


def test_an_upload_larger_than_the_disk_is_refused_at_once(store: FolderStore) -> None:
    with pytest.raises(Exhausted, match="bytes left, the draft needs 9223372036854775808"):
        store.begin(2**63)


def test_leftovers_of_interrupted_uploads_are_cleaned(store: FolderStore, tmp_path: Path) -> None:
    for left in ("a.part", "b.part"):
        (tmp_path / "uploads" / left).write_bytes(b"half")
    put(store)
    assert store.clean() == 2
    assert store.digests() == {DIGEST}


def test_a_blob_that_is_deleted_is_gone_and_deleting_it_again_is_no_error(store: FolderStore) -> None:
    put(store)
    with store.open(DIGEST) as reader:
        store.delete(DIGEST)
        store.delete(DIGEST)
        assert reader.read() == DATA, "who reads it now reads it to its end"
    with pytest.raises(NotFound, match=f"no blob {DIGEST}"):
        store.open(DIGEST)


def test_documents_are_replaced_whole_and_listed(store: FolderStore) -> None:
    assert store.read_document("default", 1) == b""
    store.write_document("default", 1, b"first")
    store.write_document("default", 1, b"second")
    store.write_document("other", 12, b"third")
    assert store.read_document("default", 1) == b"second"
    assert list(store.documents()) == [("default", 1), ("other", 12)]
    store.delete_document("default", 1)
    store.delete_document("default", 1)
    assert list(store.documents()) == [("other", 12)]
