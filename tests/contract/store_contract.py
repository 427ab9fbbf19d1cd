"""What the archive relies on in every store. Subclass `StoreContract` as `TestX` and give it the fixture `store`, empty."""

import pytest
from tests.support.checkpoints import sha256

from updraft_chassis.errors import Corrupt, Exhausted, InvalidInput, NotFound
from updraft_registry.storage.stores.port import Store, Upload

DATA = b"0123456789" * 100
DIGEST = sha256(DATA)


def sealed(store: Store, data: bytes = DATA) -> Upload:
    upload = store.begin(len(data))
    upload.write(0, data)
    upload.seal(sha256(data))
    return upload


def put(store: Store, data: bytes = DATA) -> str:
    digest, upload = sha256(data), sealed(store, data)
    store.prepare(upload, digest)
    store.commit(upload, digest)
    upload.discard()
    return digest


def read(store: Store, digest: str = DIGEST) -> bytes:
    with store.open(digest) as file:
        return file.read()


class StoreContract:
    def test_a_committed_upload_is_read_back_under_its_digest(self, store: Store) -> None:
        assert put(store) == DIGEST
        assert read(store) == DATA
        assert store.digests() == {DIGEST}

    def test_an_empty_blob_is_a_blob_too(self, store: Store) -> None:
        assert read(store, put(store, b"")) == b""

    def test_an_upload_is_nowhere_before_it_is_committed(self, store: Store) -> None:
        upload = sealed(store)
        assert store.digests() == frozenset()
        store.prepare(upload, DIGEST)
        assert store.digests() == frozenset()
        assert upload.path.exists()
        upload.discard()
        assert not upload.path.exists()

    def test_the_same_blob_again_is_one_blob(self, store: Store) -> None:
        put(store)
        put(store)
        assert store.digests() == {DIGEST}
        assert read(store) == DATA

    def test_discarding_what_was_committed_deletes_nothing(self, store: Store) -> None:
        upload = sealed(store)
        store.prepare(upload, DIGEST)
        store.commit(upload, DIGEST)
        upload.discard()
        upload.discard()
        assert store.digests() == {DIGEST}

    def test_a_truncated_upload_is_refused_with_both_sizes(self, store: Store) -> None:
        upload = store.begin(len(DATA))
        upload.write(0, DATA[:-1])
        with pytest.raises(InvalidInput, match="ended after 999 bytes, but its manifest states 1000"):
            upload.seal(DIGEST)
        upload.discard()

    def test_a_flipped_bit_is_corrupt(self, store: Store) -> None:
        upload = store.begin(len(DATA))
        upload.write(0, bytes([DATA[0] ^ 1]) + DATA[1:])
        with pytest.raises(Corrupt, match=f"its manifest states {DIGEST}"):
            upload.seal(DIGEST)
        upload.discard()

    def test_chunks_that_leave_a_gap_or_repeat_are_refused(self, store: Store) -> None:
        upload = store.begin(len(DATA))
        upload.write(0, DATA[:10])
        for offset in (0, 20):
            with pytest.raises(InvalidInput, match=f"a chunk at byte {offset}, expected byte 10"):
                upload.write(offset, b"x")
        upload.discard()

    def test_more_than_was_announced_is_refused_before_it_is_written(self, store: Store) -> None:
        upload = store.begin(4)
        with pytest.raises(InvalidInput, match="more than the 4 bytes"):
            upload.write(0, b"12345")
        upload.discard()

    def test_an_upload_larger_than_the_disk_is_refused_at_once(self, store: Store) -> None:
        with pytest.raises(Exhausted, match="bytes left, the draft needs 9223372036854775808"):
            store.begin(2**63)

    def test_leftovers_of_interrupted_uploads_are_cleaned(self, store: Store) -> None:
        for _ in range(2):
            sealed(store)
        put(store)
        assert store.clean() == 2
        assert store.digests() == {DIGEST}

    def test_a_blob_that_is_deleted_is_gone_and_deleting_it_again_is_no_error(self, store: Store) -> None:
        put(store)
        with store.open(DIGEST) as reader:
            store.delete(DIGEST)
            store.delete(DIGEST)
            assert reader.read() == DATA, "who reads it now reads it to its end"
        with pytest.raises(NotFound, match=f"no blob {DIGEST}"):
            store.open(DIGEST)
        assert store.digests() == frozenset()

    def test_documents_are_replaced_whole_and_listed(self, store: Store) -> None:
        assert store.read_document("default", 1) == b""
        store.write_document("default", 1, b"first")
        store.write_document("default", 1, b"second")
        store.write_document("other.one", 12, b"third")
        assert store.read_document("default", 1) == b"second"
        assert list(store.documents()) == [("default", 1), ("other.one", 12)]
        store.delete_document("default", 1)
        store.delete_document("default", 1)
        assert list(store.documents()) == [("other.one", 12)]
