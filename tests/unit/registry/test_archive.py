"""Publication, recovery, retention: store and catalogue stay together."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.support.checkpoints import BF16_NAN, OTHER_TARGET, Checkpoint, draft, sha256
from tests.support.versions import NOW_MS

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import Conflict, InvalidInput, NotFound
from updraft_registry.archive import Archive, Recovered, open_archive
from updraft_registry.rollout import decide
from updraft_registry.version import Phase, Policy


class Opened:
    """An archive in a folder that can be closed, tampered with and opened again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self.recovered = Recovered(uploads=0, added=0, lost=0)
        self.archive = self._open()

    def _open(self) -> Archive:
        archive = self._stack.enter_context(open_archive(self.folder, defaults=Policy(), max_draft_bytes=10**6))
        self.recovered = archive.recover(NOW_MS)
        return archive

    def close(self) -> None:
        self._stack.close()

    def reopen(self) -> None:
        self.archive = self._open()

    def publish(self, weights: Checkpoint, **fields: Any) -> tuple[int, bool]:
        manifest = weights.manifest(**fields)
        known = self.archive.admit(manifest)
        if known is not None:
            return known, True
        upload = self.archive.begin(manifest)
        try:
            upload.write(0, weights.data)
            self.archive.verify(upload, manifest)
            return self.archive.publish(upload, manifest, NOW_MS)
        finally:
            upload.discard()

    def settle(self) -> None:
        speculator = self.archive.catalogue.speculator("default")
        decision = decide(speculator.wish, speculator.versions, [], NOW_MS)
        self.archive.record("default", decision.transitions)

    def phases(self) -> dict[int, Phase]:
        rows = self.archive.catalogue.page("default", after=None, size=100)
        return {version.number: version.phase for version, _ in rows}

    def blobs(self) -> set[str]:
        return {f"sha256:{path.name}" for path in (self.folder / "blobs" / "sha256").iterdir()}

    def lose_catalogue(self) -> None:
        for path in self.folder.glob("catalogue.sqlite3*"):
            path.unlink()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    archive = Opened(tmp_path / "registry")
    yield archive
    archive.close()


def test_versions_count_from_one(opened: Opened) -> None:
    assert opened.publish(draft(1)) == (1, False)
    assert opened.publish(draft(2), parent_version=1) == (2, False)
    file, manifest = opened.archive.open("default", 2)
    with file:
        assert file.read() == draft(2).data
    assert manifest == draft(2).manifest(parent_version=1)


def test_the_same_content_again_is_the_version_that_it_was(opened: Opened) -> None:
    opened.publish(draft(1))
    assert opened.publish(draft(1)) == (1, True)
    assert opened.phases() == {1: Phase.PENDING}


def test_the_same_content_that_lost_the_race_is_the_version_of_the_winner(opened: Opened) -> None:
    manifest = draft(1).manifest()
    late = opened.archive.begin(manifest)
    late.write(0, draft(1).data)
    opened.archive.verify(late, manifest)
    opened.publish(draft(1))
    assert opened.archive.publish(late, manifest, NOW_MS) == (1, True)
    late.discard()
    assert opened.publish(draft(2)) == (2, False)


def test_the_same_content_is_another_version_of_another_speculator(opened: Opened) -> None:
    opened.publish(draft(1))
    assert opened.publish(draft(1), speculator="other") == (1, False)
    assert opened.blobs() == {draft(1).digest}


def test_what_is_refused_leaves_nothing_behind(opened: Opened) -> None:
    opened.publish(draft(1))
    with pytest.raises(InvalidInput, match="256 values that are not finite"):
        opened.publish(draft(fc=BF16_NAN * 256))
    with pytest.raises(InvalidInput, match="the target of this draft"):
        opened.publish(draft(2), target_fingerprint=OTHER_TARGET)
    with pytest.raises(NotFound, match="the parent"):
        opened.publish(draft(2), parent_version=9)
    assert opened.blobs() == {draft(1).digest}
    assert list((opened.folder / "uploads").iterdir()) == []
    assert opened.phases() == {1: Phase.PENDING}


def test_a_row_that_is_missing_comes_back_from_its_document(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.settle()
    opened.close()
    opened.lose_catalogue()
    opened.reopen()
    assert opened.recovered == Recovered(uploads=0, added=1, lost=0)
    assert opened.phases() == {1: Phase.STABLE}
    assert opened.publish(draft(2)) == (2, False)


def test_a_rebuilt_catalogue_remembers_what_was_rejected_and_has_one_stable_version(opened: Opened) -> None:
    trainer = {"source": registry_pb2.SOURCE_TRAINER}
    opened.publish(draft(1))
    opened.settle()
    opened.publish(draft(2), **trainer)
    opened.settle()
    before = opened.archive.catalogue.speculator("default").versions
    assert opened.phases() == {1: Phase.STABLE, 2: Phase.REJECTED}
    opened.close()
    opened.lose_catalogue()
    opened.reopen()
    assert opened.archive.catalogue.speculator("default").versions == before
    assert opened.publish(draft(2), **trainer) == (2, True)
    opened.settle()
    assert opened.phases() == {1: Phase.STABLE, 2: Phase.REJECTED}


def test_of_two_documents_that_say_stable_the_newer_is_right(opened: Opened) -> None:
    for seed in (1, 2):
        opened.publish(draft(seed))
    opened.archive.pin("default", 2, "", NOW_MS)
    opened.settle()
    opened.close()
    for document in (opened.folder / "versions" / "default").iterdir():
        document.write_text(document.read_text().replace("PHASE_HELD", "PHASE_STABLE"))
    opened.lose_catalogue()
    opened.reopen()
    assert opened.phases() == {1: Phase.SUPERSEDED, 2: Phase.STABLE}


@pytest.mark.parametrize(
    "rubbish",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(b"{}", id="nothing said"),
        pytest.param(b'{"version": 8, "manifest": {"speculator": "default"}}', id="another version"),
        pytest.param(b'{"version": 7, "manifest": {"speculator": "default"}}', id="no digest"),
    ],
)
def test_a_document_that_is_rubbish_is_ignored(opened: Opened, rubbish: bytes) -> None:
    opened.publish(draft(1))
    opened.close()
    (opened.folder / "versions" / "default" / "7.json").write_bytes(rubbish)
    opened.reopen()
    assert opened.phases() == {1: Phase.PENDING}


def test_a_document_that_repeats_the_content_of_another_is_ignored(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.close()
    documents = opened.folder / "versions" / "default"
    copy = (documents / "1.json").read_text().replace('"version": 1', '"version": 2')
    (documents / "2.json").write_text(copy)
    opened.reopen()
    assert opened.phases() == {1: Phase.PENDING}


def test_a_blob_without_a_row_is_harmless_and_goes_with_the_next_sweep(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.close()
    stray = opened.folder / "blobs" / "sha256" / sha256(b"stray").removeprefix("sha256:")
    stray.write_bytes(b"stray")
    opened.reopen()
    assert opened.recovered == Recovered(uploads=0, added=0, lost=0)
    assert opened.archive.sweep(opened.archive.catalogue.speculator("default"), {1}) == 1
    assert opened.blobs() == {draft(1).digest}


def test_weights_that_vanished_fail_their_version(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.settle()
    opened.close()
    (opened.folder / "blobs" / "sha256" / draft(1).digest.removeprefix("sha256:")).unlink()
    opened.reopen()
    assert opened.recovered == Recovered(uploads=0, added=0, lost=1)
    version, _ = opened.archive.catalogue.version("default", 1)
    assert (version.phase, version.reason) == (Phase.FAILED, "its weights are gone from the store")
    with pytest.raises(NotFound, match="version 1 of default is Failed; its weights are no longer kept"):
        opened.archive.open("default", 1)


def test_leftovers_of_an_interrupted_upload_are_cleaned_at_start(opened: Opened) -> None:
    opened.close()
    (opened.folder / "uploads" / "a.part").write_bytes(b"half")
    opened.reopen()
    assert opened.recovered.uploads == 1
    assert list((opened.folder / "uploads").iterdir()) == []


def test_weights_that_were_swept_come_back_with_the_same_content(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.archive.sweep(opened.archive.catalogue.speculator("default"), ())
    assert opened.blobs() == set()
    with pytest.raises(Conflict, match="version 1 of default is Pending; its weights are no longer kept"):
        opened.archive.pin("default", 1, "", NOW_MS)
    assert opened.publish(draft(1)) == (1, True)
    opened.archive.pin("default", 1, "", NOW_MS)


def test_a_condemned_version_cannot_be_pinned(opened: Opened) -> None:
    opened.publish(draft(1), source=registry_pb2.SOURCE_TRAINER)
    opened.settle()
    with pytest.raises(Conflict, match="version 1 of default is Rejected and never served again: it comes without"):
        opened.archive.pin("default", 1, "", NOW_MS)


def test_an_unknown_speculator_cannot_be_pinned_or_paused(opened: Opened) -> None:
    with pytest.raises(NotFound, match="there is no speculator 'default'; known are none yet"):
        opened.archive.pin("default", 0, "", NOW_MS)
    with pytest.raises(NotFound, match="there is no speculator"):
        opened.archive.pause("default", is_paused=True, reason="", now_ms=NOW_MS)


def test_one_folder_is_one_registrys(opened: Opened) -> None:
    with pytest.raises(Conflict, match="another registry works in"):
        Opened(opened.folder)


def test_a_folder_that_is_a_file_is_told_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="set UPDRAFT_REGISTRY_DATA_DIR to a folder"):
        Opened(tmp_path / "file")
